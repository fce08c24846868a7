// Calls of the HTTP interface, with the bearer token where there is one.

const TOKEN = "rpg-token";

export class Refusal extends Error {
  constructor(line, status = 0) {
    super(line);
    this.status = status;
  }
}

export const getToken = () => sessionStorage.getItem(TOKEN) ?? "";
export const setToken = (token) => sessionStorage.setItem(TOKEN, token);

// The answer of a call that succeeded; a Refusal with the service's own line otherwise.
export async function call(path, { headers = {}, ...options } = {}) {
  const token = getToken();
  if (/[^!-~]/.test(token)) throw new Refusal("token: expected letters, digits and signs without spaces");
  const all = token ? { ...headers, Authorization: `Bearer ${token}` } : headers;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: all });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("the service does not answer");
  }
  if (!answer.ok) throw new Refusal(await reason(answer), answer.status);
  return answer;
}

export const ask = async (path, options) => (await call(path, options)).json();

async function reason(answer) {
  try {
    return (await answer.json()).detail;
  } catch {
    return `the service answered with ${answer.status} ${answer.statusText}`.trim();
  }
}

// Every news of a job until it has ended. EventSource cannot send a token, so the stream is read by hand.
export async function* follow(id, signal) {
  while (true) {
    try {
      for await (const job of events(id, signal)) {
        yield job;
        if (job.ended !== null) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refusal && error.status >= 400 && error.status < 500) throw error;
    }
    // The front was restarted, or the connection was lost; the job goes on meanwhile.
    await new Promise((resolve) => setTimeout(resolve, 1000));
    if (signal.aborted) return;
  }
}

async function* events(id, signal) {
  const answer = await call(`v1/jobs/${id}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.match(/^data: (.*)$/m);
      if (data) yield JSON.parse(data[1]);
    }
  }
}

// Have the browser save what `path` answers with.
export async function download(path, name) {
  if (!getToken()) {
    // Straight to disk, however large.
    saveLink(path, name);
    return;
  }
  saveBlob(await (await call(path)).blob(), name);
}

export function saveBlob(blob, name) {
  const url = URL.createObjectURL(blob);
  saveLink(url, name);
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

function saveLink(href, name) {
  const link = document.createElement("a");
  link.href = href;
  link.download = name;
  link.click();
}
