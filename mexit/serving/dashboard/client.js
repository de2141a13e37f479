// Requests to the server of this page. A token is kept in this tab alone.

const KEY = "mexit-token";
const TIMEOUT_MS = 10000;

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

// The response of a path relative to the page; raises ServerError with the server's own message.
export async function ask(path, options = {}) {
  const value = token.get();
  const headers = { ...(value ? { Authorization: `Bearer ${value}` } : {}), ...options.headers };
  const signal = AbortSignal.timeout(options.timeout_ms ?? TIMEOUT_MS);
  const response = await fetch(path, {
    method: options.method ?? "GET",
    body: options.body,
    headers,
    signal,
    cache: "no-store",
  });
  if (response.ok) return response;
  let message = `status ${response.status}`;
  try {
    message = (await response.json()).error ?? message;
  } catch {
    // Answers from below the application are plain text.
  }
  throw new ServerError(response.status, message);
}

export const get = async (path) => (await ask(path)).json();

export const post = async (path, body, timeout_ms) => (await ask(path, { method: "POST", body, timeout_ms })).json();
