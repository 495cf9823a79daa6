// The server's own API: what is served, and one streamed answer at a time.

// Says what the server says of itself; throws Error with its message.
export async function serverInfo() {
  return (await checked(await fetch("server_info"))).json();
}

// Streams the answer to a chat. `hear` takes each event's object; `signal` ends it.
// Throws Error with the server's message, or AbortError.
export async function streamChat(body, hear, signal) {
  const response = await checked(
    await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...body, stream: true }),
      signal,
    }),
  );
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let isWhole = false;
  try {
    // To the connection's own end: one that is left before would be as if its client had gone.
    for await (const data of dataOf(reader)) {
      if (data === "[DONE]") {
        isWhole = true;
        continue;
      }
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Error(parsed.error.message);
      hear(parsed);
    }
  } finally {
    reader.cancel().catch(() => {}); // an answer that nobody hears is not made to its end
  }
  if (!isWhole) throw new Error("the connection ended before the answer did");
}

// The data of each event, without the comments that keep the connection open.
async function* dataOf(reader) {
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ")) yield event.slice("data: ".length);
    }
  }
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // No body of the server's: the status has to do.
  }
  throw new Error(message);
}
