// What the page shows of one evaluation.
const LABELS = { utility: "Utility", over_refusal: "Over-refusal", benign_refusal: "Refusal of benign prompts" };

function showProgress(place, progress, isFinal) {
  const rows = ROLES.filter((role) => progress[role]).map((role) => {
    const { done, total, attack, variant, reused, outcomes } = progress[role];
    const seen = Object.entries(outcomes || {}).filter(([, n]) => n).map(([name, n]) => `${n} ${name}`).join(", ");
    const words = `${done} of ${total}${reused ? ` (${reused} reused)` : ""}, ${variant || attack}${seen ? `: ${seen}` : ""}`;
    return element("div", { class: "work" }, element("strong", {}, role),
      element("progress", { max: total || 1, value: done, "aria-label": `Progress of ${role}` }), element("span", {}, words));
  });
  place.replaceChildren(...(isFinal ? [] : rows));
}

function showResults(place, results) {
  place.replaceChildren();
  phone.onchange = () => { const chart = place.querySelector(".chart"); if (chart) chart.replaceChildren(depthCurve(results.asr)); };
  if (!results) return;
  place.append(cards(results));
  for (const sentence of results.safety_regressions || []) place.append(element("p", { class: "price" }, sentence));
  if (results.asr) {
    place.append(element("figure", {}, element("h3", {}, "Attack success by prefill depth"),
      element("div", { class: "chart", tabindex: "0" }, depthCurve(results.asr)),
      element("figcaption", {}, "Share of harmful prompts answered harmfully; the bands are 95 % intervals.")));
  }
  if (results.attacks && Object.keys(results.attacks).length) place.append(attackTable(results.attacks));
  place.append(otherRates(results));
  if (results.comparisons && results.comparisons.length) place.append(comparisonTable(results.comparisons));
}

function cards(results) {
  const place = element("div", { class: "cards" });
  const card = (label, value, note) => place.append(element("div", { class: "card" },
    element("p", {}, label), element("strong", {}, value), element("p", {}, note)));
  const asr = results.asr || {};
  for (const role of ROLES.filter((name) => asr[name])) {
    card(`Attack success of ${role}, mean over depths`, percent(asr[role].mean.rate), interval(asr[role].mean));
  }
  if (results.asr_reduction != null) card("Attack success removed by training", percent(results.asr_reduction), "student against aligned");
  return place;
}

function attackTable(attacks) {
  const filter = element("select", { id: "attack-filter" }, element("option", { value: "" }, "all"),
    ...Object.keys(attacks).map((name) => element("option", { value: name }, name)));
  const roles = ROLES.filter((role) => Object.values(attacks).some((found) => found[role]));
  const rows = Object.entries(attacks).map(([name, found]) => {
    const reduced = Object.values(found).find((block) => block.reduced);
    const title = element("th", { scope: "row" }, name);
    if (reduced) {
      const why = (reduced.reduced_because || []).join("; ");
      title.append(element("small", { class: "reduced" }, `reduced${why ? `: ${why}` : ""}`));
    }
    return element("tr", { "data-attack": name }, title, ...roles.map((role) => attackCell(found[role] || {})));
  });
  filter.addEventListener("change", () => {
    for (const row of rows) row.hidden = Boolean(filter.value) && row.dataset.attack !== filter.value;
  });
  const caption = "Large: mean over variants and draws. Worst of n: behaviours that any of them broke. "
    + "Corrected: the mean after the judge's own measured errors.";
  return element("figure", {}, element("div", { class: "bar" }, element("h3", {}, "Attacks"),
    element("label", { for: "attack-filter" }, "Show ", filter)), table([["Attack"], ...roles.map((role) => [role, `number ${role}`])], rows, "Attacks"), element("figcaption", {}, caption));
}

function attackCell(block) {
  const cell = rateCell(block.mean);
  const line = (name, rate) => element("small", {}, `${name} ${percent(rate.rate)} (${interval(rate)})`);
  if (block.worst_of_n && block.worst_of_n.n) cell.append(line("worst of n", block.worst_of_n));
  if (block.mean && block.mean.n) cell.append(block.corrected ? line("corrected", block.corrected) : element("small", {}, "not corrected"));
  return cell;
}

function otherRates(results) {
  const found = Object.entries(LABELS).filter(([key]) => results[key]).map(([key, label]) => [label, results[key]]);
  for (const [name, by] of Object.entries(results.capabilities || {})) {
    const rates = Object.entries(by).map(([role, block]) => [role, block && block.accuracy]);
    found.push([`${name.toUpperCase()} accuracy`, Object.fromEntries(rates)]);
  }
  const roles = ROLES.filter((role) => found.some(([, by]) => by[role]));
  const rows = found.map(([label, by]) => element("tr", {}, element("th", { scope: "row" }, label), ...roles.map((role) => rateCell(by[role]))));
  if (!rows.length) return element("div");
  return element("figure", {}, element("h3", {}, "What safety costs"),
    table([["Measure"], ...roles.map((role) => [role, `number ${role}`])], rows, "What safety costs"));
}

function comparisonTable(comparisons) {
  const points = (value) => `${value > 0 ? "+" : ""}${(100 * value).toFixed(1)}`;
  const rows = comparisons.map((found) => element("tr", {}, element("th", { scope: "row" }, found.attack || LABELS[found.measure] || found.measure),
    element("td", {}, `${found.first} minus ${found.second}`),
    element("td", { class: "number" }, points(found.difference),
      element("small", {}, `${points(found.low)} to ${points(found.high)}, n\u00a0=\u00a0${found.n}`))));
  return element("figure", {}, element("h3", {}, "Differences between models, in percentage points"),
    table([["Measure"], ["Models"], ["Difference", "number"]], rows, "Differences between models"),
    element("figcaption", {}, "Paired bootstrap over prompts, 95 % intervals."));
}

function showSample(sample) {
  const head = `${sample.role}, ${sample.variant}, ${sample.prompt_id}: ${sample.outcome ?? "–"}`;
  if (sample.continuation === null) {
    return element("li", {}, element("strong", {}, head), element("p", { class: "withheld" }, "Text of an answer to an attack, hidden."));
  }
  return element("li", {}, element("strong", {}, head),
    element("pre", { tabindex: "0" }, element("span", { class: "prefill" }, sample.prefill), sample.continuation));
}
