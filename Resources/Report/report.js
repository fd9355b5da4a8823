"use strict";
// The slice viewer: every picture is already on the page, so changing the slice only changes which ids are used.
(() => {
  const viewer = document.getElementById("viewer");
  const slider = document.getElementById("slice");
  const heat = document.getElementById("heat");
  const slices = JSON.parse(document.getElementById("viewer-data").textContent).slices;
  const last = Number(viewer.dataset.count) - 1;

  function draw() {
    const k = Number(slider.value);
    viewer.querySelectorAll("use[data-id]").forEach((use) => use.setAttribute("href", `#${use.dataset.id}-${k}`));
    const chosen = heat && heat.value !== "" ? heat.selectedOptions[0] : null;
    viewer.querySelectorAll("figure").forEach((figure) => {
      const shown = chosen && figure.dataset.sequence === chosen.dataset.sequence;
      figure.classList.toggle("framed", Boolean(shown));
      figure.style.setProperty("--c", shown ? chosen.dataset.color : "transparent");
      const use = figure.querySelector("use.heat");
      if (use) use.setAttribute("href", shown ? `#h${chosen.value}-${k}` : "");
    });
    const { s, said, note } = slices[k];
    document.getElementById("where").textContent = `Slice ${k + 1} of ${last + 1} (S ${s.toFixed(1)} mm)`;
    document.getElementById("said").textContent = said.length ? `Model on this slice by itself: ${said.join(", ")}${note}` : "";
  }

  function go(k) {
    slider.value = Math.max(0, Math.min(last, k));
    draw();
  }

  slider.addEventListener("input", draw);
  if (heat) heat.addEventListener("change", draw);
  viewer.querySelectorAll("button[data-go]").forEach((b) => b.addEventListener("click", () => go(Number(b.dataset.go))));
  viewer.querySelectorAll("input[data-outline]").forEach((box) =>
    box.addEventListener("change", () => viewer.classList.toggle(`hide-${box.dataset.outline}`, !box.checked)));
  viewer.addEventListener("keydown", (event) => {
    if (event.target.tagName === "SELECT") return;
    const k = Number(slider.value);
    const to = { ArrowUp: k + 1, ArrowRight: k + 1, ArrowDown: k - 1, ArrowLeft: k - 1,
      PageUp: k + 5, PageDown: k - 5, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go(to);
  });
  let turned = 0;
  viewer.querySelector(".key").addEventListener("wheel", (event) => {
    event.preventDefault();
    turned += event.deltaMode === 0 ? event.deltaY : 40 * event.deltaY;
    if (Math.abs(turned) < 30) return;
    go(Number(slider.value) - Math.sign(turned));
    turned = 0;
  }, { passive: false });
  draw();
})();
