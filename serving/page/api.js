// What the page asks of the server, and how it may fail.
//
//   await listModels()                            -> [{id: "sft", context: 512, parameters: 26e6, chat: true}]
//   await renderMarkdown("**Hi**")                -> "<p><strong>Hi</strong></p>\n"
//   for await (const chunk of chat(request)) ...  -> {choices: [{delta: {content: "Hi"}}]}, ..., {usage: {...}}
//
// Lost: nobody answered, or the answer broke off. Refused: the server said no, and why (OpenAI's form of an error).

const KEY = "seedling.key";

export class Lost extends Error {}

export class Refused extends Error {
  constructor(status, { message, code }) {
    super(message);
    Object.assign(this, { status, code });
  }
}

/** Kept for this tab alone: sessionStorage ends with it. */
export const setKey = (key) => sessionStorage.setItem(KEY, key);

export async function listModels() {
  return (await (await ask("/v1/models")).json()).data;
}

export async function renderMarkdown(text) {
  return (await (await ask("/render", { text })).json()).html;
}

/** The chunks of a streamed answer. Leaving the loop, or aborting `signal`, ends the request. */
export async function* chat(request, signal) {
  const stream = { ...request, stream: true, stream_options: { include_usage: true } };
  const answer = await ask("/v1/chat/completions", stream, signal);
  for await (const data of events(answer.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(answer.status, chunk.error);
    yield chunk;
  }
  throw new Lost("the answer ended before [DONE]");
}

async function ask(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const options = { method: body ? "POST" : "GET", headers, signal, ...(body && { body: JSON.stringify(body) }) };
  const answer = await unlessAborted(fetch(path, options), signal);
  if (answer.ok) return answer;
  const error = await answer.json().then((json) => json.error, () => null);
  throw new Refused(answer.status, error ?? { message: `${answer.status} ${answer.statusText}` });
}

/** The data of server-sent events: what stands after "data: ", an event ending with an empty line. */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await unlessAborted(reader.read(), signal);
    if (done) return;
    const parts = (text + value).split(/\r?\n\r?\n/);
    text = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (data.length) yield data.join("\n");
    }
  }
}

/** A network's failure as Lost; that the user stopped it stays an AbortError. */
async function unlessAborted(promise, signal) {
  try {
    return await promise;
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Lost(error.message);
  }
}
