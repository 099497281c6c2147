// Elements and words. Text from the server enters the page as text nodes only.
const ROLES = ["base", "aligned", "student"];

const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  fill(made, attributes, children);
  return made;
}

function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  fill(made, attributes, children);
  return made;
}

function fill(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.map((child) => (child instanceof Node ? child : document.createTextNode(String(child)))));
}

const percent = (value) => `${(100 * value).toFixed(1)}\u00a0%`;

const interval = (rate) => `${(100 * rate.low).toFixed(1)}\u2013${(100 * rate.high).toFixed(1)}, n\u00a0=\u00a0${rate.n}`;

function rateCell(rate) {
  if (!rate || !rate.n) return element("td", { class: "number" }, "\u2013");
  return element("td", { class: "number" }, percent(rate.rate), element("small", {}, interval(rate)));
}

const moment = (seconds) => (seconds ? new Date(seconds * 1000).toLocaleString() : "");

function table(headings, rows, caption) {
  const head = element("tr", {}, ...headings.map(([text, kind]) => element("th", { scope: "col", class: kind || "" }, text)));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
}
