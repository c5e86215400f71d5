// K1 on a CPU: from logits to a decision in one pass over each token's row, and back.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

extern "C" {

// Mirrored by kernels/cpu_route.py, field by field. All floats are float32, all arrays dense.
struct Route {
  const float* logits;      // [tokens, experts]
  const float* bias;        // [experts] or null
  int32_t* indices;         // [tokens, slots]
  float *weights, *scores;  // [tokens, slots], [tokens, experts]
  const float *dweights, *dscores;  // gradients of the same, or null
  float* dlogits;           // [tokens, experts]
  int64_t tokens, experts, slots, sigmoid, renormalise;
};
}

namespace {

struct Candidate {
  float key;
  int32_t expert;
};

// False where a logit is NaN or infinite; -inf, which leaves an adapter out, has the score 0.
bool score(const float* logits, float* scores, int64_t experts, bool sigmoid) {
  float top = -INFINITY;
  bool sound = true;
  for (int64_t e = 0; e < experts; ++e) {
    sound &= logits[e] < INFINITY;
    top = std::max(top, logits[e]);
  }
  if (sigmoid || top == -INFINITY) {
    for (int64_t e = 0; e < experts; ++e) scores[e] = sigmoid ? 1 / (1 + std::exp(-logits[e])) : 0;
    return sound;
  }
  float total = 0;
  for (int64_t e = 0; e < experts; ++e) total += scores[e] = std::exp(logits[e] - top);
  for (int64_t e = 0; e < experts; ++e) scores[e] /= total;
  return sound;
}

// The highest keys, in order; of equal ones the lower index first.
void select(const Route& r, const float* logits, const float* scores, std::vector<Candidate>& best) {
  best.clear();
  for (int64_t e = 0; e < r.experts; ++e) {
    if (logits[e] == -INFINITY) continue;
    const float key = r.bias != nullptr ? scores[e] + r.bias[e] : logits[e];
    const bool full = static_cast<int64_t>(best.size()) == r.slots;
    if (full && !(key > best.back().key)) continue;
    if (full) best.pop_back();
    const auto higher = [](float k, const Candidate& c) { return k > c.key; };
    best.insert(std::upper_bound(best.begin(), best.end(), key, higher), {key, static_cast<int32_t>(e)});
  }
}

void differentiate(const Route& r, int64_t t) {
  const int32_t* chosen = r.indices + t * r.slots;
  const float *w = r.weights + t * r.slots, *s = r.scores + t * r.experts;
  float* dl = r.dlogits + t * r.experts;
  const float* ds = r.dscores == nullptr ? nullptr : r.dscores + t * r.experts;
  float pull = 0, total = 0, all = 0;
  const float* dw = r.dweights == nullptr ? nullptr : r.dweights + t * r.slots;
  for (int64_t i = 0; dw != nullptr && i < r.slots; ++i)
    if (chosen[i] >= 0) {
      pull += w[i] * dw[i];
      total += s[chosen[i]];
    }
  for (int64_t e = 0; ds != nullptr && !r.sigmoid && e < r.experts; ++e) all += s[e] * ds[e];
  if (!r.sigmoid && !r.renormalise) all += pull;
  for (int64_t e = 0; e < r.experts; ++e) {
    const float own = ds == nullptr ? 0 : ds[e];
    dl[e] = r.sigmoid ? s[e] * (1 - s[e]) * own : s[e] * (own - all);
  }
  for (int64_t i = 0; dw != nullptr && i < r.slots; ++i) {
    if (chosen[i] < 0) continue;
    const float p = s[chosen[i]], change = r.renormalise ? dw[i] - pull : dw[i];
    if (!r.sigmoid) dl[chosen[i]] += (r.renormalise ? w[i] : p) * change;
    else dl[chosen[i]] += p * (1 - p) * change / (r.renormalise ? std::max(total, FLT_MIN) : 1);
  }
}

}  // namespace

extern "C" {

// 1 where a logit is NaN or infinite (-inf leaves an adapter out).
int route_forward(const Route* route) {
  const Route& r = *route;
  std::vector<Candidate> best;
  best.reserve(r.slots + 1);
  for (int64_t t = 0; t < r.tokens; ++t) {
    const float* logits = r.logits + t * r.experts;
    float* scores = r.scores + t * r.experts;
    if (!score(logits, scores, r.experts, r.sigmoid)) return 1;
    select(r, logits, scores, best);
    float total = 0;
    for (const Candidate& c : best) total += scores[c.expert];
    total = r.renormalise ? std::max(total, FLT_MIN) : 1;
    for (int64_t i = 0; i < r.slots; ++i) {
      const bool some = i < static_cast<int64_t>(best.size());
      r.indices[t * r.slots + i] = some ? best[i].expert : -1;
      r.weights[t * r.slots + i] = some ? scores[best[i].expert] / total : 0;
    }
  }
  return 0;
}

int route_backward(const Route* route) {
  for (int64_t t = 0; t < route->tokens; ++t) differentiate(*route, t);
  return 0;
}
}
