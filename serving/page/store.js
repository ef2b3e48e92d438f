// Conversations and preferences, kept in the browser (localStorage), one entry a conversation, so that two tabs do not
// overwrite each other's.
//
//   {id: "7-3", updated: 1764460800000, saved: 1764460801000, models: ["sft"], settings: {temperature: 0.7, ...},
//    turns: [{user: "Hi", answers: [{model: "sft", content: "Hello!", reasoning: "", calls: [], state: "done",
//                                    tokens: 3, seconds: 0.02, first: 0.05, leftOut: 0}]}]}
//
// `updated` is when it was last asked something, which orders the list; `saved` when it was last written. A turn has an
// answer a model, so two where two models answer side by side. An answer's state: running, done, stopped
// (by the user), cut (by its length), lost (the server) or refused (by the server; `problem` says why).

const CONVERSATION = "seedling.conversation.";
const PREFERENCE = "seedling.";

// `alone`: a message is sent without those before it
export const DEFAULTS = { system: "", temperature: 0.7, top_p: 0.9, max_tokens: 256, seed: null, alone: false };

export function newConversation(models) {
  const settings = { ...DEFAULTS, ...preference("settings", {}) };
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), updated: Date.now(), models, settings, turns: [] };
}

export const newAnswer = (model) => ({
  model, content: "", reasoning: "", calls: [], state: "running", tokens: 0, seconds: 0, first: 0, leftOut: 0,
});

export function title(conversation) {
  return conversation.turns[0]?.user.trim().split("\n")[0].slice(0, 80) ?? "";
}

export function readConversations() {
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(CONVERSATION));
  return keys.map((key) => read(key, null)).filter((conversation) => conversation?.turns);
}

/** What was being answered when its page was closed has been stopped by that. */
export function stopAll(conversations) {
  for (const answer of conversations.flatMap(({ turns }) => turns.flatMap(({ answers }) => answers))) {
    if (answer.state === "running") answer.state = "stopped";
  }
}

/** Whether there was room for it. */
export function save(conversation) {
  return conversation.turns.length === 0 || write(CONVERSATION + conversation.id, conversation);
}

export function remove(conversation) {
  localStorage.removeItem(CONVERSATION + conversation.id);
}

/** Call with nothing when another tab has changed a conversation. */
export function whenChangedElsewhere(call) {
  addEventListener("storage", ({ key }) => (key === null || key.startsWith(CONVERSATION)) && call());
}

export const preference = (name, otherwise) => read(PREFERENCE + name, otherwise);
export const setPreference = (name, value) => write(PREFERENCE + name, value);

function read(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    console.warn(`${key} in localStorage is not JSON; it is left as it is`);
    return otherwise;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch (error) {
    if (error.name === "QuotaExceededError") return false;
    throw error;
  }
}
