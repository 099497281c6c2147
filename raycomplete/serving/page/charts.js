// The depth curve: rates with their 95 % intervals, depth on a scale that keeps the first tokens apart.
const WIDE = { width: 760, height: 330, left: 52, right: 92, top: 14, bottom: 46 };
const NARROW = { width: 380, height: 280, left: 46, right: 62, top: 14, bottom: 46 }; // as wide as a phone, so that text stays legible
const phone = matchMedia("(max-width: 640px)");
let CHART = WIDE;
const MARKS = { base: "square", aligned: "circle", student: "diamond" };
const DASHES = { base: "7 3", aligned: "2 3", student: "none" };

function depthCurve(asr) {
  CHART = phone.matches ? NARROW : WIDE;
  const roles = ROLES.filter((role) => asr[role]);
  const depths = [...new Set(roles.flatMap((role) => Object.keys(asr[role].by_depth)))].map(Number).sort((a, b) => a - b);
  const most = Math.log2(1 + Math.max(1, ...depths));
  const x = (depth) => CHART.left + (Math.log2(1 + depth) / most) * (CHART.width - CHART.left - CHART.right);
  const y = (rate) => CHART.top + (1 - rate) * (CHART.height - CHART.top - CHART.bottom);
  const chart = drawn("svg", { viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img", "aria-label": spoken(asr, roles, depths) });
  axes(chart, depths, x, y);
  const ends = [];
  for (const role of roles) {
    const points = depths.filter((depth) => asr[role].by_depth[depth]?.n).map((depth) => [depth, asr[role].by_depth[depth]]);
    curve(chart, role, points, x, y);
    if (points.length) ends.push([role, x(points.at(-1)[0]), y(points.at(-1)[1].rate)]);
  }
  names(chart, ends);
  return chart;
}

function axes(chart, depths, x, y) {
  for (const rate of [0, 0.25, 0.5, 0.75, 1]) {
    chart.append(
      drawn("line", { class: "grid", x1: CHART.left, x2: CHART.width - CHART.right, y1: y(rate), y2: y(rate) }),
      drawn("text", { x: CHART.left - 8, y: y(rate) + 4, "text-anchor": "end" }, `${100 * rate}\u00a0%`));
  }
  let free = -Infinity;
  for (const depth of depths) {
    if (x(depth) - free < 22) continue;
    free = x(depth);
    chart.append(drawn("text", { x: x(depth), y: y(0) + 18, "text-anchor": "middle" }, depth));
  }
  chart.append(drawn("text", { x: (CHART.left + CHART.width - CHART.right) / 2, y: CHART.height - 6, "text-anchor": "middle" },
    "tokens of a harmful answer already written (prefill depth)"));
}

function curve(chart, role, points, x, y) {
  const group = drawn("g", { class: role });
  const line = (values) => values.map(([depth, rate]) => `${x(depth).toFixed(1)},${y(rate).toFixed(1)}`).join(" ");
  const upper = points.map(([depth, rate]) => [depth, rate.high]);
  const lower = points.map(([depth, rate]) => [depth, rate.low]).reverse();
  group.append(
    drawn("polygon", { class: "band", points: line([...upper, ...lower]) }),
    drawn("polyline", { class: "line", points: line(points.map(([depth, rate]) => [depth, rate.rate])), "stroke-dasharray": DASHES[role] }));
  for (const [depth, rate] of points) {
    group.append(mark(MARKS[role], x(depth), y(rate.rate), `${role}, depth ${depth}: ${percent(rate.rate)} (${interval(rate)})`));
  }
  chart.append(group);
}

function mark(shape, cx, cy, title) {
  const made = shape === "circle"
    ? drawn("circle", { class: "mark", cx, cy, r: 4.2 })
    : drawn("rect", { class: "mark", x: cx - 3.8, y: cy - 3.8, width: 7.6, height: 7.6 });
  if (shape === "diamond") made.setAttribute("transform", `rotate(45 ${cx} ${cy})`);
  made.append(drawn("title", {}, title));
  return made;
}

// Names stand at the ends of their curves, pushed apart where curves end together.
function names(chart, ends) {
  let free = -Infinity;
  for (const [role, cx, cy] of ends.sort((a, b) => a[2] - b[2])) {
    const at = Math.max(cy + 4, free + 16);
    free = at;
    chart.append(drawn("text", { class: `name ${role}`, x: cx + 10, y: at }, role));
  }
}

function spoken(asr, roles, depths) {
  const said = roles.map((role) => `${role}: ` + depths.filter((depth) => asr[role].by_depth[depth]?.n)
    .map((depth) => `${depth} tokens ${percent(asr[role].by_depth[depth].rate)}`).join(", "));
  return `Attack success by prefill depth. ${said.join(". ")}.`;
}
