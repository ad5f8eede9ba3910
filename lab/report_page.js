"use strict";
// Draws the charts from the page's data, again when the colours or the data change.

const COLORS = 8;
const LONGEST = 40; // characters of a name in a chart
const AXES = { step: "step", tokens: "tokens", seconds: "seconds of training" };
const FINE = {
  displaylogo: false,
  displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
  modeBarButtons: [["toImage", "resetScale2d"]],
  responsive: true,
};
const ROLES = {
  "embeddings": "embeddings", "token pairs": "token-pairs", "attention": "attention", "MLP": "mlp",
  "gains and scales": "gains", "others": "others", "file": "file",
};
let data = JSON.parse(document.getElementById("data").textContent);
let axis = "step";
const hidden = new Set();

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Plotly reads tags in texts; those of a run are no tags.
function plain(text) {
  if (text.length > LONGEST) text = `${text.slice(0, LONGEST - 1)}…`;
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function runColor(i) {
  return color(`run-${i % COLORS}`);
}

function layout(changes) {
  const line = { gridcolor: color("grid"), linecolor: color("line"), zeroline: false, automargin: true };
  const { xaxis, yaxis, ...rest } = changes;
  return {
    height: 300,
    margin: { l: 8, r: 10, t: 10, b: 8 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("soft") },
    hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("ink") }, namelength: -1 },
    hovermode: "x unified",
    showlegend: false,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("soft"), activecolor: color("ink") },
    xaxis: { type: "linear", ...line, ...xaxis },
    yaxis: { type: "linear", ...line, ...yaxis },
    ...rest,
  };
}

function overSteps(changes = {}) {
  const { yaxis, ...rest } = changes;
  const title = { text: AXES[axis], standoff: 6, font: { size: 12 } };
  const xaxis = { title, exponentformat: "SI", hoverformat: axis === "seconds" ? ".1f" : ",.0f" };
  return layout({ xaxis, yaxis: { hoverformat: ".5~g", ...yaxis }, uirevision: axis, ...rest });
}

// Draws traces into a figure, or says why there are none.
function draw(id, traces, changes, nothing) {
  const figure = document.getElementById(id);
  const chart = figure.querySelector(".chart");
  figure.classList.toggle("none", !traces.length);
  if (!traces.length) {
    Plotly.purge(chart);
    chart.innerHTML = `<p class="note"></p>`;
    chart.firstChild.textContent = nothing;
    return;
  }
  if (!chart.classList.contains("js-plotly-plot")) chart.textContent = "";
  Plotly.react(chart, traces, changes, FINE);
}

function shownRuns() {
  return data.runs.map((run, i) => ({ ...run, i })).filter(run => !hidden.has(run.i));
}

function has(column) {
  return column.some(value => value !== null);
}

function curve(run, table, column, changes = {}) {
  const { line, name, ...rest } = changes;
  const alone = run[table].step.length < 2;
  return {
    type: "scatter",
    mode: alone ? "markers" : "lines",
    x: run[table][axis],
    y: run[table][column],
    name: plain(run.name) + (name || ""),
    line: { color: runColor(run.i), width: 1.8, ...line },
    marker: { color: runColor(run.i), size: 6 },
    ...rest,
  };
}

function drawLoss(runs) {
  const traces = [];
  for (const run of runs) {
    if (has(run.train.loss)) {
      traces.push(curve(run, "train", "loss", { name: " as logged", line: { width: 1 }, opacity: 0.45 }));
      traces.push(curve(run, "train", "mean", { name: " mean", line: { width: 2.2 } }));
    }
    if (has(run.val.loss)) {
      const marker = { color: color("card"), size: 8, symbol: "diamond", line: { color: runColor(run.i), width: 2 } };
      traces.push(curve(run, "val", "loss", { name: " validation", mode: "markers", marker }));
    }
  }
  draw("loss", traces, overSteps({ height: 380 }), "No loss has been logged.");
}

function drawBpb(runs) {
  const traces = [];
  for (const run of runs) {
    const color = runColor(run.i);
    if (has(run.val.bpb)) traces.push(curve(run, "val", "bpb", { mode: "lines+markers" }));
    if (run.final !== null && run.val.step.length) {
      const marker = { color, size: 13, symbol: "star" };
      const x = [run.val[axis].at(-1)];
      traces.push(curve(run, "val", "bpb", { name: " artifact", mode: "markers", x, y: [run.final], marker }));
    }
  }
  draw("bpb", traces, overSteps({ yaxis: { hoverformat: ".4f" } }), "There has been no validation.");
}

// A vertical axis with room around the values; logarithmic, where the greatest would flatten the rest.
function scale(runs, column, ends = []) {
  const values = runs.flatMap(run => run.train[column]).filter(value => value !== null).concat(ends).sort((a, b) => a - b);
  const [least, usual, most] = [values[0], values[Math.floor(values.length / 2)], values.at(-1)];
  if (least > 0 && most > 6 * usual) return { type: "log", dtick: most < 50 * least ? Math.log10(2) : 1 };
  const room = 0.04 * (most - least);
  return { autorangeoptions: { include: [least - room, most + room] } };
}

function drawTrain(id, runs, ends) {
  const traces = runs.filter(run => has(run.train[id])).map(run => curve(run, "train", id));
  const yaxis = scale(runs, id, ends);
  draw(id, traces, overSteps({ height: 240, yaxis }), "These runs have not logged it.");
}

function kind(name) {
  return name.replace(/\.\d+(?=\.)/g, "").replace(/^blocks\./, "").replace(/\.weight$/, "");
}

// Each kind of tensor has a line; the dots of runs lie side by side on it.
function drawErrors(runs) {
  const traces = [];
  const known = runs.filter(run => run.tensors.some(tensor => tensor.error > 0));
  const kinds = [];
  for (const [place, run] of known.entries()) {
    const tensors = run.tensors.filter(tensor => tensor.error > 0);
    for (const tensor of tensors) if (!kinds.includes(kind(tensor.name))) kinds.push(kind(tensor.name));
    const shift = 0.6 * ((place + 0.5) / known.length - 0.5);
    traces.push({
      type: "scatter",
      mode: "markers",
      x: tensors.map(tensor => tensor.error),
      y: tensors.map(tensor => kinds.indexOf(kind(tensor.name)) + shift),
      text: tensors.map(tensor => `${plain(tensor.name)}, ${tensor.stored}`),
      hovertemplate: "%{text}<br>%{x:.3%}<extra>" + plain(run.name) + "</extra>",
      marker: { color: runColor(run.i), size: 9, opacity: 0.75, line: { color: color("card"), width: 1 } },
    });
  }
  const xaxis = { type: "log", tickformat: "~%", dtick: 1, side: "bottom" };
  const yaxis = { tickvals: kinds.map((_, i) => i), ticktext: kinds.map(plain), range: [kinds.length - 0.4, -0.6] };
  const changes = layout({ height: 70 + (18 + 8 * known.length) * kinds.length, hovermode: "closest", xaxis, yaxis });
  draw("error", traces, changes, "There are no errors to show; the notes below say why.");
}

function treemap(run) {
  const roles = [...new Set(run.tensors.map(tensor => tensor.role))];
  const sum = role => run.tensors.reduce((all, t) => all + (t.role === role ? t.total : 0), 0);
  const total = run.tensors.reduce((all, tensor) => all + tensor.total, 0);
  const tint = role => color(ROLES[role]);
  const ids = ["", ...roles, ...run.tensors.map(tensor => `tensor ${tensor.name}`)];
  const parents = ["", ...roles.map(() => " "), ...run.tensors.map(tensor => tensor.role)];
  ids[0] = " ";
  return {
    type: "treemap",
    ids,
    parents,
    labels: ["the file", ...roles, ...run.tensors.map(tensor => plain(tensor.name.replace(/\.weight$/, "")))],
    values: [total, ...roles.map(sum), ...run.tensors.map(tensor => tensor.total)],
    branchvalues: "total",
    marker: {
      colors: [color("card"), ...roles.map(tint), ...run.tensors.map(tensor => tint(tensor.role))],
      line: { color: color("card"), width: 1.5 },
      pad: { t: 20, l: 3, r: 3, b: 3 },
      cornerradius: 3,
    },
    textfont: { color: color("on-role"), size: 12 },
    texttemplate: "%{label}<br>%{value:,}",
    hovertemplate: "%{label}<br>%{value:,} bytes, %{percentRoot:.1%}<extra></extra>",
    pathbar: { visible: false },
    tiling: { pad: 2 },
  };
}

function drawTreemaps(runs) {
  const charts = document.querySelector("#artifacts .charts");
  charts.querySelectorAll(".bytes").forEach(figure => { figure.hidden = true; });
  const known = runs.filter(run => run.tensors.length);
  for (const [place, run] of known.entries()) {
    const id = `bytes-${run.i}`;
    if (!document.getElementById(id)) {
      const figure = document.createElement("figure");
      figure.id = id;
      figure.innerHTML = `<figcaption><span></span> <small></small></figcaption><div class="chart"></div>`;
      charts.insertBefore(figure, document.getElementById("error"));
    }
    const figure = document.getElementById(id);
    const total = run.tensors.reduce((all, tensor) => all + tensor.total, 0);
    figure.hidden = false;
    const alone = known.length % 2 && place === known.length - 1;
    figure.className = alone ? "bytes wide" : "bytes";
    figure.querySelector("span").textContent = `Bytes of ${run.name}`;
    figure.querySelector("small").textContent = `${total.toLocaleString("en")} in the artifact; a click goes into a part`;
    const margin = { l: 4, r: 4, t: 8, b: 8 };
    draw(id, [treemap(run)], layout({ height: 380, margin, uirevision: "1" }), "");
  }
}

function drawAll() {
  const runs = shownRuns();
  drawLoss(runs);
  drawBpb(runs);
  drawTrain("lr_scale", runs, [0, 1]);
  drawTrain("momentum", runs);
  drawTrain("grad_norm", runs);
  drawTrain("step_ms", runs);
  drawTreemaps(runs);
  drawErrors(runs);
}

function watchBoxes() {
  for (const box of document.querySelectorAll(".show")) {
    const run = Number(box.dataset.run);
    box.checked = !hidden.has(run);
    box.addEventListener("change", () => {
      hidden[box.checked ? "delete" : "add"](run);
      drawAll();
    });
  }
}

// Takes in the page's parts as they are now; what the reader has opened stays open.
function takeIn(parts) {
  const open = new Map([...document.querySelectorAll("details")].map(each => [each.id, each.open]));
  data = { ...data, runs: parts.runs, version: parts.version };
  for (const id of ["top", "bottom"]) document.getElementById(id).innerHTML = parts[id];
  for (const each of document.querySelectorAll("details")) each.open = open.get(each.id) ?? each.open;
  watchBoxes();
  drawAll();
}

async function ask() {
  const news = document.getElementById("news");
  try {
    const answer = await fetch(`data.json?${data.version}`);
    if (answer.status === 200) takeIn(await answer.json());
    news.textContent = answer.ok ? "updates while the run goes on" : await answer.text();
  } catch {
    news.textContent = "the server is gone; what it last sent stays";
  }
  setTimeout(ask, 1000 * data.poll);
}

document.getElementById("axis").addEventListener("change", event => {
  axis = event.target.value;
  drawAll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
watchBoxes();
drawAll();
if (data.poll) ask();
