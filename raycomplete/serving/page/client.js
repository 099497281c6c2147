// Talking to the server. The token stays in this tab's session storage and travels in a header only.
const TOKEN_KEY = "raycomplete.token";

class Refusal extends Error {
  constructor(status, problem, remedy) {
    super([problem, remedy].filter(Boolean).join(" "));
    this.status = status;
  }
}

function headers(extra) {
  const token = sessionStorage.getItem(TOKEN_KEY);
  return token ? { ...extra, Authorization: `Bearer ${token}` } : { ...extra };
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers(options.headers) });
  if (answer.ok) return answer.json();
  let said = {};
  try { said = await answer.json(); } catch { /* a proxy's error page */ }
  throw new Refusal(answer.status, said.problem || `The server answered ${answer.status}.`, said.remedy);
}

function query(path, values) {
  const chosen = Object.entries(values).filter(([, value]) => value !== "" && value != null);
  return chosen.length ? `${path}?${new URLSearchParams(chosen)}` : path;
}

function submitEvaluation(body) {
  // One key for one press of the button: when the answer gets lost, the retry finds the same evaluation.
  const key = crypto.randomUUID ? crypto.randomUUID() : String(Math.random()).slice(2) + Date.now();
  const post = () => ask("/v1/evaluations", {
    method: "POST", body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", "Idempotency-Key": key },
  });
  return post().catch((error) => { if (error instanceof Refusal) throw error; return post(); });
}

// EventSource cannot send the token, so the stream is read by hand: frames, ids and reconnection.
function follow(id, onEvent, onConnection) {
  const stopper = new AbortController();
  let last = 0;
  let delay = 1000;
  const pause = () => new Promise((resume) => setTimeout(resume, delay));

  async function once() {
    const answer = await fetch(`/v1/evaluations/${encodeURIComponent(id)}/events`, {
      headers: headers({ "Last-Event-ID": String(last) }), signal: stopper.signal,
    });
    if (!answer.ok) throw new Refusal(answer.status, `The server answered ${answer.status}.`);
    onConnection(true);
    delay = 1000;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return false;
      const frames = (rest + value).split("\n\n");
      rest = frames.pop();
      for (const frame of frames) if (take(frame)) return true;
    }
  }

  function take(frame) {
    const fields = {};
    for (const line of frame.split("\n")) {
      const at = line.indexOf(": ");
      if (at > 0) fields[line.slice(0, at)] = line.slice(at + 2);
    }
    if (!fields.id) return false;
    last = Number(fields.id);
    onEvent(fields.event, JSON.parse(fields.data));
    return ["succeeded", "failed", "cancelled"].includes(fields.event);
  }

  (async () => {
    while (!stopper.signal.aborted) {
      try {
        if (await once()) return;
      } catch (error) {
        if (stopper.signal.aborted) return;
        if (error instanceof Refusal && error.status < 500) { onConnection(false, error.message); return; }
      }
      onConnection(false);
      await pause();
      delay = Math.min(delay * 2, 15000);
    }
  })();
  return () => stopper.abort();
}
