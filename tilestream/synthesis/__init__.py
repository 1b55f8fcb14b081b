"""Synthetic colour fundus photographs with known lesions.

`photograph` draws one, `grades` draws how many of each grade. Camera, eye and lesions come from separate random
streams: only the lesions depend on the grade. Imports nothing of ours.
"""

from tilestream.synthesis.lesions import LESION_KINDS
from tilestream.synthesis.photograph import BALANCED_SHARES, EYEPACS_SHARES, Lesion, Photograph, grades, photograph

__all__ = ["BALANCED_SHARES", "EYEPACS_SHARES", "LESION_KINDS", "Lesion", "Photograph", "grades", "photograph"]
