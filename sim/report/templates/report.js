"use strict";
// Draws the figures, keeps their time axes equal, and shows or hides runs in all of them.
const figures = JSON.parse(document.getElementById("figures").textContent);
const timed = ["timeline", "plans"].filter((id) => id in figures);
const options = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
const full = timed.length ? figures[timed[0]].layout.xaxis.range.slice() : null;

// A link such as report.html#t=10,50 opens the page at 10 to 50 s.
const asked = /^#t=(-?[\d.]+),(-?[\d.]+)$/.exec(location.hash);
if (asked && Number(asked[1]) < Number(asked[2])) {
  for (const id of timed) figures[id].layout.xaxis.range = [Number(asked[1]), Number(asked[2])];
}

function setRange(from, range) {
  for (const id of timed) {
    const shown = document.getElementById(id).layout.xaxis.range;
    if (id !== from && (shown[0] !== range[0] || shown[1] !== range[1])) Plotly.relayout(id, { "xaxis.range": range.slice() });
  }
  const isFull = range[0] === full[0] && range[1] === full[1];
  history.replaceState(null, "", isFull ? "#" : `#t=${range.map((value) => Number(value.toPrecision(8))).join(",")}`);
}

function follow(id, change) {
  if (change["xaxis.autorange"]) {
    Plotly.relayout(id, { "xaxis.range": full.slice() });
  } else if ("xaxis.range[0]" in change) {
    setRange(id, [change["xaxis.range[0]"], change["xaxis.range[1]"]]);
  } else if ("xaxis.range" in change) {
    setRange(id, change["xaxis.range"]);
  }
}

function showRuns() {
  const boxes = [...document.querySelectorAll("input[data-run]")];
  const hidden = new Set(boxes.filter((box) => !box.checked).map((box) => Number(box.dataset.run)));
  for (const id of Object.keys(figures)) {
    const visible = figures[id].data.map(({ meta }) =>
      meta.budget_of ? !meta.budget_of.every((run) => hidden.has(run)) : !hidden.has(meta.run)
    );
    Plotly.restyle(id, { visible });
  }
}

const drawn = Object.entries(figures).map(([id, figure]) => Plotly.newPlot(id, figure.data, figure.layout, options));
Promise.all(drawn).then(() => {
  for (const id of timed) document.getElementById(id).on("plotly_relayout", (change) => follow(id, change));
  for (const box of document.querySelectorAll("input[data-run]")) box.addEventListener("change", showRuns);
  document.body.dataset.drawn = drawn.length;
});
