// The clients of Node, each as its users write it. The only argument is a file with what is asked and expected.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { InferenceClient } from "@huggingface/inference";
import OpenAI from "openai";

const { url, key, name, texts, expected, phase } = JSON.parse(readFileSync(process.argv[2], "utf8"));
const narrow = rows => rows.map(row => Array.from(Float32Array.from(row)));
const same = got => assert.deepEqual(narrow(got), narrow(expected));

async function openai() {
  const client = apiKey => new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
  const embed = (more = {}, apiKey = key) => client(apiKey).embeddings.create({ model: name, input: texts, ...more });
  if (phase === "overload") {
    await assert.rejects(embed(), OpenAI.RateLimitError);
  } else if (phase === "stopping") {
    await assert.rejects(embed(), OpenAI.InternalServerError);
  } else {
    for (const more of [{}, { encoding_format: "float" }]) {
      same((await embed(more)).data.map(entry => entry.embedding));
    }
    assert.equal((await embed({ dimensions: 3 })).data[0].embedding.length, 3);
    await assert.rejects(embed({}, "no-such-key"), OpenAI.AuthenticationError);
    await assert.rejects(embed({ model: "nosuch" }), OpenAI.NotFoundError);
    await assert.rejects(embed({ input: [] }), error => error instanceof OpenAI.BadRequestError && error.code === "empty_input");
    await assert.rejects(embed({ input: Array(33).fill("a") }), OpenAI.UnprocessableEntityError);
  }
}

async function inference() {
  // Else it asks again for as long as the answer is 503.
  const once = { retry_on_error: false };
  const embed = (inputs, token = key) => new InferenceClient(token, { endpointUrl: url }).featureExtraction({ inputs }, once);
  if (phase === "answers") {
    same(await embed(texts));
    await assert.rejects(embed("a", "no-such-key"), error => error.httpResponse?.status === 401);
    await assert.rejects(embed(""), error => error.httpResponse?.status === 400);
  } else {
    await assert.rejects(embed("a"), error => error.httpResponse?.status === (phase === "overload" ? 429 : 503));
  }
}

for (const [label, run] of [["openai (npm)", openai], ["@huggingface/inference", inference]]) {
  await run();
  console.log(phase.padEnd(10), label);
}
