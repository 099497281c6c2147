// State of the page and its events.
const page = { items: [], next: null, open: null, unfollow: null, options: null, progress: {}, harmful: false, shown: 0 };

const say = (text) => { byId("status").textContent = text; };

function failed(error) {
  if (error instanceof Refusal && (error.status === 401 || (error.status === 403 && !page.options))) {
    askForToken(sessionStorage.getItem(TOKEN_KEY) ? error.message : "");
  } else {
    say(error.message);
  }
}

function askForToken(problem) {
  byId("content").hidden = true;
  byId("login").hidden = false;
  byId("login-problem").textContent = problem;
  byId("token").focus();
}

async function start() {
  try {
    page.options = await ask("/v1/options");
  } catch (error) { failed(error); return; }
  byId("login").hidden = true;
  byId("content").hidden = false;
  byId("forget").hidden = !sessionStorage.getItem(TOKEN_KEY);
  fillForm();
  await refresh();
  const wanted = location.hash.slice(1);
  if (wanted) await open(wanted);
}

function choice(kind, value, checked) {
  const box = element("input", { type: "checkbox", name: kind, value });
  box.checked = checked;
  return element("label", { class: "check" }, box, value);
}

function fillForm() {
  if (document.querySelector("#new-models input")) return; // filled before a second login
  byId("new-models").append(...ROLES.map((role) => choice("role", role, true)));
  byId("new-attacks").append(...page.options.attacks.filter((name) => name !== "prefill").map((name) => choice("attack", name, false)));
  byId("new-prompts").max = page.options.max_prompts;
  byId("new-prompts").placeholder = page.options.defaults.num_prompts;
}

async function refresh() {
  try {
    const found = await ask(query("/v1/evaluations", { limit: 25, state: byId("filter-state").value, label: byId("filter-label").value }));
    page.items = found.items;
    page.next = found.next;
    showList();
  } catch (error) { failed(error); }
}

async function older() {
  try {
    const found = await ask(query("/v1/evaluations", {
      limit: 25, before: page.next, state: byId("filter-state").value, label: byId("filter-label").value }));
    page.items.push(...found.items);
    page.next = found.next;
    showList();
  } catch (error) { failed(error); }
}

function showList() {
  const focused = document.activeElement && document.activeElement.dataset.id;
  byId("list").tBodies[0].replaceChildren(...page.items.map(listRow));
  byId("list-empty").hidden = page.items.length > 0;
  byId("more").hidden = page.next === null;
  if (focused) document.querySelector(`#list [data-id="${CSS.escape(focused)}"]`)?.focus();
}

function listRow(item) {
  const name = element("button", { type: "button", "data-id": item.id }, item.label || item.id);
  name.addEventListener("click", () => open(item.id, true));
  const works = Object.values(item.progress);
  const sum = (key) => works.reduce((total, work) => total + work[key], 0);
  const words = works.length ? `${sum("done")} of ${sum("total")} trials` : "";
  const state = item.cancelling ? "cancelling" : item.state;
  return element("tr", { "aria-current": String(item.id === page.open) }, element("td", {}, name),
    element("td", {}, element("span", { class: `badge ${item.state}` }, state)), element("td", {}, words),
    element("td", {}, moment(item.created)), element("td", {}, item.attempts));
}

async function open(id, byHand = false) {
  page.unfollow?.();
  page.open = id;
  page.progress = {};
  hideHarmful();
  history.replaceState(null, "", `#${encodeURIComponent(id)}`);
  let item;
  try { item = await ask(`/v1/evaluations/${encodeURIComponent(id)}`); } catch (error) { failed(error); return; }
  if (page.open !== id) return;
  showDetail(item);
  showList();
  if (byHand) byId("detail").focus();
  if (!isFinal(item.state)) page.unfollow = follow(id, (kind, data) => onEvent(item, kind, data), onConnection);
}

const isFinal = (state) => ["succeeded", "failed", "cancelled"].includes(state);

function showDetail(item) {
  page.progress = item.progress;
  byId("detail").hidden = false;
  byId("detail-title").textContent = item.label || item.id;
  showState(item);
  showResults(byId("results"), item.results);
  byId("samples").hidden = item.state !== "succeeded";
  byId("sample-list").replaceChildren();
  byId("sample-more").hidden = true;
  byId("sample-note").textContent = "";
  const attacks = Object.keys((item.results && item.results.attacks) || {});
  byId("sample-attack").replaceChildren(element("option", { value: "" }, "all"), ...attacks.map((name) => element("option", { value: name }, name)));
}

function showState(item) {
  byId("detail-state").textContent = item.cancelling ? "cancelling" : item.state;
  byId("detail-state").className = `badge ${item.state}`;
  byId("cancel").hidden = isFinal(item.state) || item.cancelling;
  byId("detail-error").hidden = !item.error;
  byId("detail-error").textContent = item.error || "";
  showProgress(byId("progress"), page.progress, item.state === "succeeded");
}

async function onEvent(item, kind, data) {
  if (page.open !== item.id) return;
  if (kind === "progress") page.progress[data.role] = data;
  else if (kind === "cancelling") item.cancelling = true;
  else if (kind === "started") Object.assign(item, { state: "running", error: null, attempts: data.attempt });
  else if (kind === "waiting") Object.assign(item, { state: "queued", error: data.error });
  const known = page.items.find((other) => other.id === item.id);
  if (known) { Object.assign(known, { state: item.state, cancelling: item.cancelling, attempts: item.attempts, progress: { ...page.progress } }); showList(); }
  if (isFinal(kind)) {
    page.unfollow = null;
    await open(item.id);
    await refresh();
    say(`Evaluation ${item.label || item.id}: ${kind}.`);
  } else {
    showState(item);
  }
}

function onConnection(there, problem) {
  say(there ? "Live." : problem || "Connection lost, trying again ...");
}

function hideHarmful() {
  page.harmful = false;
  byId("sample-harmful").hidden = true;
  byId("sample-harmful").setAttribute("aria-pressed", "false");
  byId("sample-harmful").textContent = "Show harmful text";
}

async function loadSamples(more) {
  if (!more) { page.shown = 0; byId("sample-list").replaceChildren(); }
  const asked = { limit: 20, offset: page.shown, include_harmful: page.harmful, role: byId("sample-role").value,
    attack: byId("sample-attack").value, outcome: byId("sample-outcome").value };
  try {
    const found = await ask(query(`/v1/evaluations/${encodeURIComponent(page.open)}/samples`, asked));
    page.shown += found.items.length;
    byId("sample-list").append(...found.items.map(showSample));
    byId("sample-more").hidden = page.shown >= found.total;
    byId("sample-harmful").hidden = !page.options.show_harmful || !found.total;
    byId("sample-note").textContent = found.saved ? `${page.shown} of ${found.total}` : "This evaluation kept no completions.";
  } catch (error) { failed(error); }
}

function toggleHarmful() {
  page.harmful = !page.harmful;
  byId("sample-harmful").setAttribute("aria-pressed", String(page.harmful));
  byId("sample-harmful").textContent = page.harmful ? "Hide harmful text" : "Show harmful text";
  loadSamples(false);
}

async function queueNew(event) {
  event.preventDefault();
  const ticked = (name) => [...document.querySelectorAll(`#new-form input[name="${name}"]:checked`)].map((box) => box.value);
  const body = { label: byId("new-label").value, roles: ticked("role"), attacks: ["prefill", ...ticked("attack")], save_completions: byId("new-save").checked };
  if (byId("new-prompts").value) body.num_prompts = Number(byId("new-prompts").value);
  if (byId("new-seed").value) body.seed = Number(byId("new-seed").value);
  byId("new-problem").textContent = "";
  try {
    const item = await submitEvaluation(body);
    toggleForm(false);
    await refresh();
    await open(item.id, true);
  } catch (error) { byId("new-problem").textContent = error.message; }
}

function toggleForm(shown) {
  byId("new-form").hidden = !shown;
  byId("open-form").setAttribute("aria-expanded", String(shown));
  if (shown) byId("new-label").focus();
}

const dark = matchMedia("(prefers-color-scheme: dark)");

function showTheme() {
  const theme = sessionStorage.getItem("raycomplete.theme") || (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-pressed", String(theme === "dark"));
}

byId("theme").addEventListener("click", () => {
  sessionStorage.setItem("raycomplete.theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  showTheme();
});
dark.addEventListener("change", showTheme);
byId("login-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN_KEY, byId("token").value);
  byId("token").value = "";
  start();
});
byId("forget").addEventListener("click", () => { sessionStorage.removeItem(TOKEN_KEY); location.reload(); });
byId("filter-state").addEventListener("change", refresh);
byId("filter-label").addEventListener("change", refresh);
byId("more").addEventListener("click", older);
byId("open-form").addEventListener("click", () => toggleForm(byId("new-form").hidden));
byId("new-form").addEventListener("submit", queueNew);
byId("cancel").addEventListener("click", () => ask(`/v1/evaluations/${encodeURIComponent(page.open)}`, { method: "DELETE" }).catch(failed));
byId("sample-load").addEventListener("click", () => loadSamples(false));
byId("sample-more").addEventListener("click", () => loadSamples(true));
byId("sample-harmful").addEventListener("click", toggleHarmful);
for (const id of ["sample-role", "sample-attack", "sample-outcome"]) byId(id).addEventListener("change", () => loadSamples(false));
setInterval(() => { if (!byId("content").hidden && !document.hidden && page.items.length <= 25) refresh(); }, 5000);
showTheme();
start();
