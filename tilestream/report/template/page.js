"use strict";
const viewer = document.getElementById("viewer");
const large = viewer.querySelector("img");
const caption = viewer.querySelector("figcaption");
const all = [...document.querySelectorAll(".zoom")];
let shown = 0;
function show(index) {
  shown = (index + all.length) % all.length;
  const button = all[shown], small = button.querySelector("img");
  const title = button.closest(".card")?.querySelector("h3").textContent;
  const text = button.parentElement.querySelector("figcaption")?.textContent;
  large.src = small.src;
  large.alt = small.alt;
  large.className = button.classList.contains("chart") ? "chart" : "";
  caption.textContent = [title, text].filter(Boolean).join(" · ");
}
all.forEach((button, index) => button.addEventListener("click", () => { show(index); viewer.showModal(); }));
viewer.addEventListener("click", (event) => {
  const step = event.target.closest(".step");
  if (step) show(shown + Number(step.dataset.step));
  else viewer.close();
});
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") show(shown - 1);
  if (event.key === "ArrowRight") show(shown + 1);
});
viewer.addEventListener("close", () => all[shown].focus());
