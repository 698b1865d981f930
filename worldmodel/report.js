"use strict";
/* Draws the charts of a report as SVG. What a chart is made of stands in worldmodel/report_charts.py. */
const DATA = JSON.parse(document.getElementById("data").textContent);
const SHAPES = ["circle", "square", "diamond", "triangle", "cross"];
const NS = "http://www.w3.org/2000/svg";
const ROW = 26, PAD = 8, LETTER = 6.7; // px

const tip = document.getElementById("tip"), said = document.getElementById("said");

function svg(name, attributes = {}, parent = null, text = null) {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}
function html(name, attributes = {}, parent = null, text = null) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}
const number = (v) => v === null || v === undefined ? "–" : v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4));
/* Names differ at their ends: what does not fit is left out in the middle. */
const shortened = (label, room) => label.length <= room ? label : `${label.slice(0, Math.ceil(room / 2) - 1)}…${label.slice(-Math.floor(room / 2))}`;
/* Of two lines where one has no room, broken at the blank that leaves the shorter longest line. */
function lined(label, room) {
  if (label.length <= room) return [label];
  const longest = (at) => Math.max(at, label.length - at - 1);
  const at = [...label.matchAll(/ /g)].map((blank) => blank.index).sort((a, b) => longest(a) - longest(b))[0];
  return (at === undefined ? [label] : [label.slice(0, at), label.slice(at + 1)]).map((part) => shortened(part, room));
}
const give = (sem) => sem ? ` ± ${number(sem)}` : "";
/* What is known by its representation alone looks as its first map from the embedding does. */
const place = (label) => DATA.arms.includes(label) ? DATA.arms.indexOf(label) : DATA.arms.findIndex((arm) => arm.startsWith(`${label} (`));
const colour = (label) => `var(--s${place(label) < 0 ? 11 : place(label) % 13})`;
const shape = (label) => SHAPES[Math.max(0, place(label)) % SHAPES.length];

function marker(kind, x, y, r, attributes, parent) {
  if (kind === "circle") return svg("circle", { cx: x, cy: y, r, ...attributes }, parent);
  const paths = {
    square: `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    diamond: `M${x},${y - r * 1.3}l${r * 1.3},${r * 1.3}l${-r * 1.3},${r * 1.3}l${-r * 1.3},${-r * 1.3}z`,
    triangle: `M${x},${y - r * 1.2}l${r * 1.2},${r * 2.1}h${-r * 2.4}z`,
    cross: `M${x - r},${y - r / 3}h${r * 2 / 3}v${-r * 2 / 3}h${r * 2 / 3}v${r * 2 / 3}h${r * 2 / 3}v${r * 2 / 3}h${-r * 2 / 3}v${r * 2 / 3}h${-r * 2 / 3}v${-r * 2 / 3}h${-r * 2 / 3}z`,
  };
  return svg("path", { d: paths[kind], ...attributes }, parent);
}
function ticks(low, high, count = 5) {
  const span = high - low || 1, step = 10 ** Math.floor(Math.log10(span / count));
  const nice = [1, 2, 5, 10].map((f) => f * step).find((s) => span / s <= count) || step * 10;
  const found = [];
  for (let v = Math.ceil(low / nice) * nice; v <= high + nice * 1e-9; v += nice) found.push(+v.toPrecision(12));
  return found;
}
function scale(low, high, from, to, log = false) {
  const f = log ? Math.log2 : (v) => v;
  const span = f(high) - f(low) || 1;
  return (v) => from + (f(v) - f(low)) / span * (to - from);
}
const extent = (values) => {
  const known = values.filter((v) => v !== null && v !== undefined && Number.isFinite(v));
  return [Math.min(...known), Math.max(...known)];
};

/* One stop of the tab key per chart; arrows walk over its marks. */
function walkable(root, marks, label) {
  root.setAttribute("role", "img");
  root.setAttribute("aria-label", `${label}. ${marks.length} values; walk with the arrow keys; the table below has them all.`);
  root.setAttribute("tabindex", "0");
  let at = -1;
  const go = (index) => {
    if (!marks.length) return;
    marks[at]?.node.classList.remove("on");
    at = (index + marks.length) % marks.length;
    marks[at].node.classList.add("on");
    const box = marks[at].node.getBoundingClientRect();
    show(marks[at], box.right + 8, box.top);
    said.textContent = marks[at].text;
  };
  root.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (event.key in steps) go(at < 0 && steps[event.key] < 0 ? marks.length - 1 : at + steps[event.key]);
    else if (event.key === "Home") go(0);
    else if (event.key === "End") go(marks.length - 1);
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
  });
  root.addEventListener("blur", () => { marks[at]?.node.classList.remove("on"); at = -1; hide(); });
  for (const mark of marks) {
    mark.node.addEventListener("pointerenter", (event) => show(mark, event.clientX + 12, event.clientY + 12));
    mark.node.addEventListener("pointerleave", hide);
  }
}
function show(mark, x, y) {
  tip.replaceChildren();
  if (mark.frame !== undefined) html("img", { src: picture(mark.frame), alt: "" }, tip);
  html("span", {}, tip, mark.text);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x, innerWidth - box.width - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(y, innerHeight - box.height - 8))}px`;
}
function hide() { tip.hidden = true; }
const picture = (key) => `data:image/webp;base64,${DATA.frames[key]}`;

function axisX(root, panel, x, low, high, bottom, values) {
  for (const v of values || ticks(low, high)) {
    svg("line", { x1: x(v), x2: x(v), y1: PAD, y2: bottom, class: "axis" }, root);
    svg("text", { x: x(v), y: bottom + 15, "text-anchor": "middle" }, root, number(v));
  }
  svg("text", { x: (x(low) + x(high)) / 2, y: bottom + 32, "text-anchor": "middle" }, root, panel.x);
}
function axisY(root, panel, y, low, high, left, right) {
  for (const v of ticks(low, high)) {
    svg("line", { x1: left, x2: right, y1: y(v), y2: y(v), class: "axis" }, root);
    svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, root, number(v));
  }
  svg("text", { x: left, y: 10, "text-anchor": "start" }, root, panel.y);
}

const DRAW = {
  dots(panel, width, label) {
    const longest = Math.max(...panel.dots.map((d) => d.label.length)), room = Math.floor((width * 0.45 - 16) / LETTER);
    const names = panel.dots.map((d) => lined(d.label, room)), row = names.some((name) => name[1]) ? ROW + 8 : ROW;
    const left = 16 + Math.min(room, longest) * LETTER, bottom = PAD + panel.dots.length * row;
    const root = svg("svg", { viewBox: `0 0 ${width} ${bottom + 38}` }), marks = [];
    let [low, high] = extent(panel.dots.flatMap((d) => [d.value, d.low, d.high, ...(d.runs || [])]).concat(panel.mark ?? []));
    low = Math.min(low, 0);
    const x = scale(low, high, left, width - 12);
    axisX(root, panel, x, low, high, bottom);
    if (panel.mark !== undefined) svg("line", { x1: x(panel.mark), x2: x(panel.mark), y1: PAD, y2: bottom, class: "mark" }, root);
    panel.dots.forEach((d, i) => {
      const y = PAD + (i + 0.5) * row, c = colour(d.label);
      names[i].forEach((part, n) => svg("text", { x: left - 8, y: y + 4 + (n - (names[i].length - 1) / 2) * 13, "text-anchor": "end", class: d.random ? "label random" : "label" }, root, part));
      if (d.low !== null && d.low !== undefined) svg("line", { x1: x(d.low), x2: x(d.high), y1: y, y2: y, stroke: c, "stroke-width": 2 }, root);
      for (const run of d.runs || []) svg("line", { x1: x(run), x2: x(run), y1: y + 5, y2: y + 10, stroke: c, "stroke-opacity": 0.6 }, root);
      const node = marker(shape(d.label), x(d.value), y, 5, { fill: c }, root);
      const interval = d.low === null || d.low === undefined ? "" : ` [${number(d.low)}, ${number(d.high)}]`;
      marks.push({ node, text: `${d.label}: ${number(d.value)}${interval}${d.note ? `, ${d.note}` : ""}${d.random ? ", random weights" : ""}` });
    });
    walkable(root, marks, label);
    return root;
  },
  lines(panel, width, label) {
    const height = 260, left = 52, bottom = height - 40;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}` }), marks = [];
    const [lowX, highX] = extent(panel.lines.flatMap((l) => l.x));
    const [low, high] = extent(panel.lines.flatMap((l) => [...l.y, ...l.low, ...l.high, 0]));
    const x = scale(lowX, highX, left, width - 12, panel.log), y = scale(low, high, bottom, 24);
    const told = (v) => v === highX || Math.log2(v) % 2 === 0 && x(highX) - x(v) > 3 * LETTER; // 64 beside 66 is neither
    axisX(root, panel, x, lowX, highX, bottom, panel.log ? [...new Set(panel.lines.flatMap((l) => l.x))].filter(told) : null);
    axisY(root, panel, y, low, high, left, width - 12);
    for (const l of panel.lines) {
      const c = colour(l.label), at = (values) => l.x.map((v, i) => `${x(v).toFixed(1)},${y(values[i]).toFixed(1)}`);
      if (!l.low.includes(null)) svg("polygon", { points: [...at(l.high), ...at(l.low).reverse()].join(" "), fill: c, "fill-opacity": 0.15 }, root);
      svg("polyline", { points: at(l.y).join(" "), fill: "none", stroke: c, "stroke-width": 2 }, root);
      l.x.forEach((v, i) => marks.push({ node: marker(shape(l.label), x(v), y(l.y[i]), 3.5, { fill: c }, root), text: `${l.label}, ${number(v)}: ${number(l.y[i])}` }));
    }
    walkable(root, marks, label);
    return root;
  },
  scatter(panel, width, label) {
    const height = 300, left = 56, bottom = height - 40;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}` }), marks = [];
    const reach = (axis) => extent(panel.points.flatMap((p) => [p[axis] - (p[`${axis}_sem`] || 0), p[axis] + (p[`${axis}_sem`] || 0)]));
    let [lowX, highX] = reach("x"), [low, high] = reach("y");
    if (panel.diagonal) { high = highX = Math.max(high, highX) * 1.05; low = lowX = Math.min(0, low, lowX) - high * 0.03; }
    else { const m = (highX - lowX || 1) * 0.08, n = (high - low || 1) * 0.08; lowX -= m; highX += m; low -= n; high += n; }
    const x = scale(lowX, highX, left, width - 12), y = scale(low, high, bottom, 24);
    axisX(root, panel, x, lowX, highX, bottom);
    axisY(root, panel, y, low, high, left, width - 12);
    if (panel.diagonal) svg("line", { x1: x(lowX), y1: y(low), x2: x(highX), y2: y(high), class: "mark" }, root);
    for (const p of panel.points) {
      const c = colour(p.label);
      if (p.x_sem) svg("line", { x1: x(p.x - p.x_sem), x2: x(p.x + p.x_sem), y1: y(p.y), y2: y(p.y), stroke: c }, root);
      if (p.y_sem) svg("line", { x1: x(p.x), x2: x(p.x), y1: y(p.y - p.y_sem), y2: y(p.y + p.y_sem), stroke: c }, root);
      const node = marker(shape(p.label), x(p.x), y(p.y), 6, { fill: p.filled ? c : "var(--paper)", stroke: c, "stroke-width": 2 }, root);
      marks.push({ node, text: `${p.label}: ${number(p.x)}${give(p.x_sem)}, ${number(p.y)}${give(p.y_sem)}` });
    }
    walkable(root, marks, label);
    return root;
  },
  map(panel, width, label) {
    const root = svg("svg", { viewBox: `0 0 ${width} ${width}` }), marks = [];
    const rows = DATA.rows[panel.rows], [low, high] = extent(rows.reward), share = scale(low, high, 0, 1);
    panel.x.forEach((v, i) => {
      const fill = `color-mix(in oklab, var(--s2) ${Math.round(100 * share(rows.reward[i]))}%, var(--s1))`;
      const node = svg("circle", { cx: 8 + v * (width - 16), cy: width - 8 - panel.y[i] * (width - 16), r: 3.5, fill, "fill-opacity": 0.8 }, root);
      marks.push({ node, frame: rows.frames[i], text: `episode ${rows.episode[i]}, row ${rows.step[i]}, reward ${number(rows.reward[i])}` });
    });
    walkable(root, marks, label);
    return root;
  },
  strip(panel, width, label) {
    const names = { true: "happened", imagined: "imagined", seen: "believed" };
    const box = html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label });
    const root = html("div", { class: "strip" }, box);
    root.style.gridTemplateColumns = `4.5rem repeat(${panel.step.length}, minmax(3.5rem, 1fr))`;
    for (const [name, title] of Object.entries(names)) {
      html("span", {}, root, title);
      panel.strip[name].forEach((key, i) => html("img", { src: picture(key), alt: `${title}, row ${panel.step[i]}` }, root));
    }
    html("span", {}, root, "row; reward, predicted");
    panel.step.forEach((step, i) => html("span", {}, root, `${step}; ${number(panel.received[i])}, ${number(+panel.predicted[i].toPrecision(2))}`));
    return box;
  },
};

/* The table behind a panel. */
function rowsOf(panel) {
  if (panel.dots) return [["", panel.x, "low", "high", "runs"], ...panel.dots.map((d) => [d.label + (d.random ? " (random weights)" : ""), d.value, d.low, d.high, (d.runs || []).map(number).join(" ") || d.note || ""])];
  if (panel.lines) return [["", panel.x, panel.y, "low", "high"], ...panel.lines.flatMap((l) => l.x.map((v, i) => [l.label, v, l.y[i], l.low[i], l.high[i]]))];
  if (panel.points) {
    const property = panel.keys.property, bars = panel.points.some((p) => p.x_sem || p.y_sem);
    const told = (p) => [...(bars ? [p.x, p.x_sem, p.y, p.y_sem] : [p.x, p.y]), ...(property ? [p.filled ? "yes" : "no"] : [])];
    const head = bars ? [panel.x, "standard error", panel.y, "standard error"] : [panel.x, panel.y];
    return [["", ...head, ...(property ? [property] : [])], ...panel.points.map((p) => [p.label, ...told(p)])];
  }
  if (panel.strip) return [["row", "received", "predicted", "distance"], ...panel.step.map((s, i) => [s, panel.received[i], panel.predicted[i], panel.distance[i]])];
  const rows = DATA.rows[panel.rows];
  return [["episode", "row", "reward", "x", "y"], ...panel.x.map((v, i) => [rows.episode[i], rows.step[i], rows.reward[i], v, panel.y[i]])];
}
function tableOf(panel, parent, label) {
  const box = html("details", {}, parent);
  html("summary", {}, box, "Table");
  box.addEventListener("toggle", () => {
    if (!box.open || box.querySelector("table")) return;
    const [head, ...rows] = rowsOf(panel), table = html("table", { "aria-label": label }, html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, box));
    const top = html("tr", {}, html("thead", {}, table)), body = html("tbody", {}, table);
    for (const cell of head) html("th", { scope: "col" }, top, cell);
    for (const row of rows) {
      const line = html("tr", {}, body);
      row.forEach((cell, i) => typeof cell === "number" || cell === null || cell === undefined ? html("td", { class: "number" }, line, number(cell)) : html(i ? "td" : "th", i ? {} : { scope: "row" }, line, String(cell)));
    }
  });
}

function legend(chart, parent) {
  if (!["lines", "scatter"].includes(chart.kind)) return;
  const labels = new Set(chart.panels.flatMap((p) => (p.lines || p.points).map((each) => each.label)));
  const list = html("ul", { class: "legend", "aria-label": "Legend" }, parent);
  for (const label of labels) {
    const item = html("li", {}, list);
    marker(shape(label), 7, 7, 5, { fill: colour(label) }, svg("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }, item));
    item.append(label);
  }
}

function build(chart, parent) {
  const section = html("section", { "aria-labelledby": chart.id, class: "chart" }, parent);
  html("h2", { id: chart.id }, section, chart.title);
  html("p", { class: "about" }, section, chart.text);
  const names = [...new Set(chart.panels.flatMap((p) => Object.keys(p.keys)))];
  const chosen = {}, filters = html("div", { class: "filters" }, section);
  const grid = () => { draw(); };
  for (const name of names) {
    const values = [...new Set(chart.panels.map((p) => p.keys[name]).filter((v) => v !== undefined))];
    if (values.length < 2) continue;
    chosen[name] = chart.beside.includes(name) ? "" : values[0];
    const label = html("label", {}, filters, name), select = html("select", { "data-key": name }, label);
    html("option", { value: "" }, select, "all");
    for (const value of values) html("option", { value }, select, value);
    select.value = chosen[name];
    select.addEventListener("change", () => { chosen[name] = select.value; grid(); });
  }
  legend(chart, section);
  const panels = html("div", { class: chart.kind === "strip" ? "panels wide" : "panels" }, section);
  function draw() {
    hide();
    panels.replaceChildren();
    for (const panel of chart.panels) {
      if (Object.entries(chosen).some(([name, value]) => value && panel.keys[name] !== value)) continue;
      const figure = html("figure", {}, panels), title = Object.values(panel.keys).filter(Boolean).join(" · ");
      html("h3", {}, figure, title || chart.title);
      const width = Math.max(260, Math.min(figure.clientWidth || 360, 560));
      const label = `${chart.title}: ${title}`;
      figure.append(DRAW[chart.kind](panel, width, label));
      if (panel.text) html("figcaption", {}, figure, panel.text);
      tableOf(panel, figure, `Table of ${label}`);
    }
    if (!panels.children.length) html("p", { class: "about" }, panels, "There is no chart of all that is chosen.");
  }
  return draw;
}

/* Charts are drawn when they come near the window, and all of them before printing; paper cannot be unfolded. */
const contents = document.getElementById("contents"), waiting = new Map();
for (const chart of DATA.charts) {
  const draw = build(chart, document.getElementById("charts"));
  waiting.set(document.getElementById(chart.id).parentElement, draw);
}
for (const heading of document.querySelectorAll("h2")) html("a", { href: `#${heading.id}` }, html("li", {}, contents), heading.textContent);
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) finish(entry.target);
}, { rootMargin: "600px" });
function finish(section) {
  near.unobserve(section);
  const draw = waiting.get(section);
  waiting.delete(section);
  if (draw) draw();
  section.dataset.drawn = "yes";
}
for (const section of waiting.keys()) near.observe(section);
addEventListener("beforeprint", () => {
  [...waiting.keys()].forEach(finish);
  for (const box of document.querySelectorAll("details.printed:not([open])")) { box.open = true; box.dataset.unfolded = ""; }
});
addEventListener("afterprint", () => {
  for (const box of document.querySelectorAll("[data-unfolded]")) { box.open = false; delete box.dataset.unfolded; }
});
