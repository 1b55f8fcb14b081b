#!/usr/bin/env bash
# Credentials by which scheduler, workers and clients of one cluster know each other: FOLDER/ca.pem, cert.pem, key.pem.
# The authority's own key is not kept: whoever holds key.pem belongs to the cluster, and nobody else ever will.
set -euo pipefail
umask 077

if [[ $# -lt 1 || $# -gt 2 || ! ${2:-365} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: ${0##*/} FOLDER [DAYS]" >&2
    exit 2
fi
folder=$1 days=${2:-365}
mkdir -p "$folder"
for name in ca cert key; do
    if [[ -e $folder/$name.pem ]]; then
        echo "${0##*/}: $folder/$name.pem is there already; remove it, or choose another folder" >&2
        exit 2
    fi
done
new=$(mktemp -d "$folder/.new.XXXXXX")
trap 'rm -rf "$new"' EXIT

cat >"$new/openssl.cnf" <<'END'
[req]
distinguished_name = subject
prompt = no
[subject]
CN = tilestream cluster
[ca]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[member]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectAltName = DNS:tilestream
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
END
for name in ca key; do
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$new/$name.key" 2>"$new/said" ||
        { cat "$new/said" >&2 && exit 1; }
done
openssl req -new -x509 -config "$new/openssl.cnf" -extensions ca -days "$days" -key "$new/ca.key" -out "$new/ca.pem"
openssl req -new -config "$new/openssl.cnf" -subj "/CN=tilestream" -key "$new/key.key" -out "$new/request.pem"
openssl x509 -req -in "$new/request.pem" -CA "$new/ca.pem" -CAkey "$new/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
    -extfile "$new/openssl.cnf" -extensions member -days "$days" -out "$new/cert.pem" 2>"$new/said" ||
    { cat "$new/said" >&2 && exit 1; }
mv "$new/key.key" "$new/key.pem"
chmod 600 "$new"/{ca,cert,key}.pem
mv -n "$new"/{ca,cert,key}.pem "$folder/"
echo "$folder: ca.pem, cert.pem, key.pem, valid for $days days"
