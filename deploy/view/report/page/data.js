// The report's data. The page holds it compressed; the index is unpacked at once, a group when it is shown.
let index = null;
const unpackedGroups = new Map();

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function unpacked(id) {
  const packed = new Blob([bytesOf(byId(id).textContent)]).stream();
  return new Response(packed.pipeThrough(new DecompressionStream("gzip"))).text();
}

async function groupOf(entry) {
  if (!unpackedGroups.has(entry.group)) unpackedGroups.set(entry.group, JSON.parse(await unpacked("g" + entry.group)));
  return unpackedGroups.get(entry.group);
}

const token = (place) => index.vocabulary[place];
const leadingTokens = (entry) => entry.lead.map((place) => tokenText(token(place)));

// Weights of the mixture that was fed back: softmax((log p + noise) / tau), METHOD 2.1.
function weightsOf(sample, step) {
  const scores = sample.logp[step].map((p, k) => (p + sample.noise[step][k]) / sample.tau);
  const top = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - top));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / total);
}

const entropyOf = (weights) => weights.reduce((sum, w) => (w > 0 ? sum - w * Math.log(w) : sum), 0);

const linkTo = (entry) => "#/trajectory/" + [entry.purpose, entry.step, entry.uid, entry.sample].map(encodeURIComponent).join("/");
const groupLink = (entry) => "#/group/" + [entry.purpose, entry.step, entry.uid].map(encodeURIComponent).join("/");

function find(purpose, step, uid, sample) {
  return index.trajectories.filter((e) => e.purpose === purpose && e.step === Number(step) && e.uid === uid &&
    (sample === undefined || e.sample === Number(sample)));
}
