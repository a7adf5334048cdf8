// A/B of linear_sm90.cu's ping-pong tiles and of attention.cu, in one run: ab DIR, where DIR has base_lin, v1, v2, v3 (.cubin) and b_att_90a, n_att_90a (.cubin).
// Bits against base with poisoned outputs, base against f64; then each kernel and the chain of 12 layers in graphs with dependent launch, variants in turn.
#include <cuda_runtime.h>
#include <cuda_fp16.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>
#define CK(x) do { cudaError_t e = (x); if (e != cudaSuccess) { printf("line %d: %s\n", __LINE__, cudaGetErrorString(e)); exit(1); } } while (0)
typedef std::vector<float> F;
static int SMS;
static cudaStream_t S;
static std::mt19937 G(7);
static float uni(float a) { return a * (float)((int)(G() >> 8) - (1 << 23)) / (1 << 23); }
static void* dev(const void* p, size_t n) { void* d; CK(cudaMalloc(&d, n)); if (p) CK(cudaMemcpy(d, p, n, cudaMemcpyHostToDevice)); return d; }
static size_t at(size_t r, size_t c, size_t rows) { return ((c / 64) * rows + r) * 64 + ((((c % 64) / 8) ^ (r & 7)) * 8) + c % 8; }
static std::vector<__half> halves(size_t n, float a) { std::vector<__half> v(n); for (auto& x : v) x = __float2half(uni(a)); return v; }
static F floats(size_t n, float a, float b = 0) { F v(n); for (auto& x : v) x = b + uni(a); return v; }
static void launch(cudaKernel_t k, int grid, int block, int cluster, size_t shared, void** args) {
    cudaLaunchConfig_t c = {}; c.gridDim = dim3(grid); c.blockDim = dim3(block); c.dynamicSmemBytes = shared; c.stream = S;
    cudaLaunchAttribute a[2]; a[0].id = cudaLaunchAttributeProgrammaticStreamSerialization; a[0].val.programmaticStreamSerializationAllowed = 1;
    a[1].id = cudaLaunchAttributeClusterDimension; a[1].val.clusterDim.x = cluster; a[1].val.clusterDim.y = a[1].val.clusterDim.z = 1;
    c.attrs = a; c.numAttrs = cluster > 1 ? 2 : 1;
    CK(cudaLaunchKernelExC(&c, (const void*)k, args));
}
struct Variant { const char* name; cudaKernel_t k[3], join; size_t bytes[3]; };
static const int OUT[4] = {2304, 768, 3072, 768}, IN[4] = {768, 768, 768, 3072}, KIND[4] = {0, 2, 1, 2};
static const char* NAME[4] = {"qkv", "output", "expansion", "contraction"};
struct Weights { void *w, *bias, *sums, *gamma, *beta; std::vector<__half> hw; F hbias, hsums, hgamma, hbeta; };
static Weights weights(int i) {
    Weights w; w.hw = halves((size_t)OUT[i] * IN[i], 0.06f); w.hbias = floats(OUT[i], 0.3f); w.hsums = floats(OUT[i], 0.5f); w.hgamma = floats(OUT[i], 0.5f, 1.f); w.hbeta = floats(OUT[i], 0.2f);
    w.w = dev(w.hw.data(), w.hw.size() * 2); w.bias = dev(w.hbias.data(), 4 * OUT[i]); w.sums = dev(w.hsums.data(), 4 * OUT[i]); w.gamma = dev(w.hgamma.data(), 4 * OUT[i]); w.beta = dev(w.hbeta.data(), 4 * OUT[i]); return w;
}
static void linear(const Variant& v, int i, const Weights& w, void* a, void* statistics, void* out, void* partials, int capacity, int tokens) {
    const bool residual = KIND[i] == 2; void* none = nullptr; int outputs = OUT[i], inputs = IN[i];
    void *sums = residual ? none : w.sums, *st = residual ? none : statistics, *res = residual ? out : none, *rst = statistics, *ga = residual ? w.gamma : none, *be = residual ? w.beta : none, *pa = residual ? partials : none;
    void *ww = w.w, *bb = w.bias;
    void* args[] = {&a, &ww, &bb, &sums, &st, &res, &rst, &ga, &be, &out, &capacity, &outputs, &inputs, &tokens, &pa};
    const int pairs = (tokens + 255) / 256 * ((outputs + 191) / 192);
    launch(v.k[KIND[i]], 2 * std::min(pairs, SMS / 2), 384, 2, v.bytes[KIND[i]], args);
}
static void join(const Variant& v, void* partials, void* statistics, void* starts, void* lengths, int rows, int tokens, int capacity, int stage, void* fault) {
    int width = 768, rms = 0; float eps = 1e-5f; void* args[] = {&partials, &statistics, &starts, &lengths, &rows, &tokens, &capacity, &width, &eps, &rms, &stage, &fault};
    launch(v.join, (tokens + 127) / 128, 128, 1, 0, args);
}
struct Att { const char* name; cudaKernel_t all, plan; bool counted; };
struct Pack { std::vector<int> len; int rows, tokens, longest; void *starts, *lengths; };
static Pack pack(std::vector<int> len) {
    Pack p; p.len = len; p.rows = len.size(); p.tokens = p.longest = 0; std::vector<int> s; for (int n : len) { s.push_back(p.tokens); p.tokens += n; p.longest = std::max(p.longest, n); }
    p.starts = dev(s.data(), 4 * s.size()); p.lengths = dev(len.data(), 4 * len.size()); return p;
}
static int entries(const Att& a, const Pack& p) {
    const int R = p.rows, T = p.tokens, L = p.longest, B = std::min(R, T / 33);
    if (a.counted) return (T + 63 * B) / 64 + (R - B + 3) / 4 + 1;
    if (L <= 32) return (R + 3) / 4;
    const int P = (2 * SMS - 1) / 12, N = std::min(B, P);
    const int wide = std::min((T + 127 * B) / 128, B * ((L + 127) / 128)) + (R - B + 3) / 4;
    return std::max(wide, std::min(std::min((T + 63 * N) / 64, N * ((L + 63) / 64)) + (R - N + 3) / 4, 2 * P + (R + 3) / 4)) + 1;
}
static void plan(const Att& a, const Pack& p, void* list) {
    int e = entries(a, p), wf = 2 * SMS, rows = p.rows; void *st = p.starts, *le = p.lengths; void* args[] = {&st, &le, &rows, &list, &e, &wf};
    launch(a.plan, 1, std::min(1024, (std::max(rows, e) + 31) / 32 * 32), 1, 0, args);
}
static void attention(const Att& a, const Pack& p, void* qkv, void* context, void* list, void* table, int reach, int capacity) {
    int e = entries(a, p), zero = 0, window = -1;
    void* counted[] = {&qkv, &context, &list, &e, &zero, &table, &reach, &capacity, &window}; void* exact[] = {&qkv, &context, &list, &zero, &table, &reach, &capacity, &window};
    launch(a.all, a.counted ? std::min(12 * e, 16 * SMS) : 12 * e, 128, 1, 38912, a.counted ? counted : exact);
}
static double median(std::vector<double> v) { std::sort(v.begin(), v.end()); return v[v.size() / 2]; }
// Microseconds of each, `each` repeats in a graph, in turn.
static std::vector<double> race(std::vector<std::function<void()>> all, int repeats, int rounds) {
    std::vector<cudaGraphExec_t> g; for (auto& f : all) { cudaGraph_t gr; cudaGraphExec_t x; CK(cudaStreamBeginCapture(S, cudaStreamCaptureModeRelaxed)); for (int i = 0; i < repeats; i++) f(); CK(cudaStreamEndCapture(S, &gr)); CK(cudaGraphInstantiate(&x, gr, 0)); g.push_back(x); }
    cudaEvent_t a, b; CK(cudaEventCreate(&a)); CK(cudaEventCreate(&b)); std::vector<std::vector<double>> t(all.size());
    for (int r = -3; r < rounds; r++) for (size_t i = 0; i < g.size(); i++) { CK(cudaGraphLaunch(g[i], S)); CK(cudaEventRecord(a, S)); CK(cudaGraphLaunch(g[i], S)); CK(cudaEventRecord(b, S)); CK(cudaStreamSynchronize(S)); float ms; CK(cudaEventElapsedTime(&ms, a, b)); if (r >= 0) t[i].push_back(ms * 1e3 / repeats); }
    std::vector<double> m; for (auto& v : t) m.push_back(median(v)); for (auto x : g) cudaGraphExecDestroy(x); return m;
}
static bool same_tokens(const std::vector<__half>& x, const std::vector<__half>& y, int tokens, int columns, int capacity) {
    if (tokens == capacity) return !memcmp(x.data(), y.data(), x.size() * 2);
    for (int t = 0; t < tokens; t++) for (int c = 0; c < columns; c++) if (memcmp(&x[at(t, c, capacity)], &y[at(t, c, capacity)], 2)) return false; return true;
}
int main(int n, char** argv) {
    const std::string dir = n > 1 ? argv[1] : "."; cudaDeviceProp p; CK(cudaGetDeviceProperties(&p, 0)); SMS = p.multiProcessorCount; printf("%s, %d multiprocessors\n", p.name, SMS); CK(cudaStreamCreate(&S));
    auto library = [&](std::string f) { cudaLibrary_t l; CK(cudaLibraryLoadFromFile(&l, (dir + "/" + f + ".cubin").c_str(), 0, 0, 0, 0, 0, 0)); return l; };
    auto kernel = [&](cudaLibrary_t l, const char* name, size_t shared) { cudaKernel_t k; CK(cudaLibraryGetKernel(&k, l, name)); if (shared > 48 << 10) CK(cudaFuncSetAttribute((const void*)k, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared)); return k; };
    std::vector<Variant> vs; struct { const char* f; size_t b[3]; } list[] = {{"base_lin", {197824, 197824, 197824}}, {"v1", {197824, 197824, 197824}}, {"v2", {197824, 197824, 230720}}, {"v3", {210112, 210112, 230720}}};
    for (auto& x : list) { auto l = library(x.f); Variant v; v.name = x.f; const char* names[3] = {"linear_sm90_pingpong_plain", "linear_sm90_pingpong_activated", "linear_sm90_pingpong_residual"}; for (int i = 0; i < 3; i++) { v.bytes[i] = x.b[i]; v.k[i] = kernel(l, names[i], x.b[i]); } v.join = kernel(l, "join_statistics", 0); vs.push_back(v); }
    std::vector<Att> as; for (auto f : {"b_att_90a", "n_att_90a"}) { auto l = library(f); as.push_back({f, kernel(l, "attention", 38912), kernel(l, "plan_attention", 0), f[0] == 'b'}); }
    Weights w[12][4]; for (auto& l : w) for (int i = 0; i < 4; i++) l[i] = weights(i);
    int bad = 0;
    for (int tokens : {1, 5, 129, 257, 1000, 4096, 16384}) for (int i = 0; i < 4; i++) {
        const int capacity = (tokens + 127) / 128 * 128, in = IN[i], out = OUT[i]; auto ha = halves((size_t)capacity * in, 2.f); std::vector<float> hs; for (int t = 0; t < capacity; t++) { hs.push_back(uni(0.3f)); hs.push_back(0.7f + uni(0.3f)); }
        auto old = halves((size_t)capacity * out, 2.f); std::vector<__half> poison((size_t)capacity * out, __ushort_as_half(0x7e01)); const bool residual = KIND[i] == 2;
        for (int t = tokens; t < capacity; t++) { for (int c = 0; c < in; c++) ha[at(t, c, capacity)] = __ushort_as_half(0x7e01); }
        void *a = dev(ha.data(), ha.size() * 2), *st = dev(hs.data(), hs.size() * 4); std::vector<__half> first; F firstp;
        for (auto& v : vs) {
            void* o = dev(residual ? old.data() : poison.data(), old.size() * 2); F hp((size_t)out / 64 * capacity * 2, NAN); void* pa = dev(hp.data(), hp.size() * 4);
            linear(v, i, w[0][i], a, st, o, pa, capacity, tokens); CK(cudaGetLastError()); CK(cudaStreamSynchronize(S));
            std::vector<__half> got(old.size()); CK(cudaMemcpy(got.data(), o, got.size() * 2, cudaMemcpyDeviceToHost)); CK(cudaMemcpy(hp.data(), pa, hp.size() * 4, cudaMemcpyDeviceToHost)); cudaFree(o); cudaFree(pa);
            if (first.empty()) {
                first = got; firstp = hp; double worst = 0;
                for (int k = 0; k < 3000; k++) { int t = k < 40 ? tokens - 1 : G() % tokens, c = k < 40 ? out - 1 - k : G() % out; double acc = 0; for (int x = 0; x < in; x++) acc += (double)__half2float(ha[at(t, x, capacity)]) * __half2float(w[0][i].hw[at(c, x, out)]);
                    double m = hs[2 * t], rs = hs[2 * t + 1], y = residual ? acc + w[0][i].hbias[c] + (__half2float(old[at(t, c, capacity)]) - m) * rs * w[0][i].hgamma[c] + w[0][i].hbeta[c] : rs * (acc - m * w[0][i].hsums[c]) + w[0][i].hbias[c];
                    if (KIND[i] == 1) y = 0.5 * y * (1 + erf(y * M_SQRT1_2)); double e = fabs(y - __half2float(got[at(t, c, capacity)])) / (5.5e-4 * fabs(y) + 2e-4); worst = std::isnan(e) ? INFINITY : std::max(worst, e); }
                if (worst > 1) { bad++; printf("BAD base %s %d tokens: %.2f of what is allowed\n", NAME[i], tokens, worst); }
            } else {
                if (!same_tokens(first, got, tokens, out, capacity)) { bad++; printf("BAD %s %s %d tokens: other bits than base\n", v.name, NAME[i], tokens); }
                if (residual) for (int c = 0; c < out / 64; c++) if (memcmp(&firstp[(size_t)c * capacity * 2], &hp[(size_t)c * capacity * 2], 8 * (size_t)tokens)) { bad++; printf("BAD %s %s %d tokens: other sums\n", v.name, NAME[i], tokens); break; }
                for (int t = (tokens + 15) / 16 * 16; t < capacity; t++) for (int c = 0; c < out; c++) if (memcmp(&got[at(t, c, capacity)], residual ? &old[at(t, c, capacity)] : &poison[0], 2)) { bad++; printf("BAD %s %s: writes behind %d tokens\n", v.name, NAME[i], tokens); t = capacity; break; }
            }
        }
        cudaFree(a); cudaFree(st);
    }
    const int reach = 511; auto ht = floats((size_t)12 * (2 * reach + 192) * 4, 3.f); void* table = dev(ht.data(), ht.size() * 4);
    std::vector<int> mix; int total = 0; while (true) { int l = 3 + (int)(G() % 100) * (int)(G() % 6 == 0 ? 4 : 1); if (total + l > 16384) break; total += l; mix.push_back(l); }
    std::sort(mix.begin(), mix.end());
    std::vector<std::pair<const char*, Pack>> packs; packs.push_back({"1x1", pack({1})}); packs.push_back({"odd", pack({0, 5, 0, 129, 127, 128, 0, 31, 32, 33, 64, 65, 512, 16, 17, 1})}); packs.push_back({"1x512", pack({512})}); packs.push_back({"1024x16", pack(std::vector<int>(1024, 16))}); packs.push_back({"32x128", pack(std::vector<int>(32, 128))}); packs.push_back({"128x128", pack(std::vector<int>(128, 128))}); packs.push_back({"32x512", pack(std::vector<int>(32, 512))}); packs.push_back({"mix", pack(mix)});
    void* fault = dev(nullptr, 64); void* lists[2] = {dev(nullptr, 1 << 20), dev(nullptr, 1 << 20)};
    printf("%-9s %10s %10s\n", "attention", "base", "exact");
    for (auto& item : packs) {
        const char* name = item.first; const Pack& pk = item.second;
        const int capacity = (pk.tokens + 127) / 128 * 128; auto hq = halves((size_t)capacity * 2304, 2.f); void* q = dev(hq.data(), hq.size() * 2); std::vector<__half> poison((size_t)capacity * 768, __ushort_as_half(0x7e01)), got[2];
        for (int i = 0; i < 2; i++) { void* c = dev(poison.data(), poison.size() * 2); CK(cudaMemset(lists[i], 0xff, 1 << 20)); plan(as[i], pk, lists[i]); attention(as[i], pk, q, c, lists[i], table, reach, capacity); CK(cudaGetLastError()); CK(cudaStreamSynchronize(S)); got[i].resize(poison.size()); CK(cudaMemcpy(got[i].data(), c, poison.size() * 2, cudaMemcpyDeviceToHost)); cudaFree(c); }
        if (memcmp(got[0].data(), got[1].data(), poison.size() * 2)) { bad++; printf("BAD attention %s: other bits\n", name); }
        for (int t = 0; t < pk.tokens; t++) if (__half_as_ushort(got[1][at(t, 0, capacity)]) == 0x7e01) { bad++; printf("BAD attention %s: token %d was left out\n", name, t); break; }
        void* c = dev(nullptr, poison.size() * 2); std::vector<std::function<void()>> f; for (int i = 0; i < 2; i++) f.push_back([&, i] { attention(as[i], pk, q, c, lists[i], table, reach, capacity); });
        auto m = race(f, 40, 9); printf("%-9s %10.2f %10.2f\n", name, m[0], m[1]); cudaFree(q); cudaFree(c);
    }
    printf("bits and values: %s\n%-8s %-11s", bad ? "BAD" : "all equal", "tokens", "linear"); for (auto& v : vs) printf(" %9s", v.name); printf("\n");
    for (size_t which : {4, 5, 7}) {
        const char* name = packs[which].first; const Pack& pk = packs[which].second; const int tokens = pk.tokens, capacity = (tokens + 127) / 128 * 128; auto hx = halves((size_t)capacity * 768, 2.f), hw = halves((size_t)capacity * 3072, 1.f); std::vector<float> hs; for (int t = 0; t < capacity; t++) { hs.push_back(uni(0.1f)); hs.push_back(0.9f); }
        void *x = dev(hx.data(), hx.size() * 2), *ctx = dev(hx.data(), hx.size() * 2), *wide = dev(hw.data(), hw.size() * 2), *qkv = dev(nullptr, (size_t)capacity * 2304 * 2), *st = dev(hs.data(), hs.size() * 4), *pa = dev(nullptr, (size_t)capacity * 12 * 8);
        auto one = [&](const Variant& v, int layer, int i) { linear(v, i, w[layer][i], i == 0 || i == 2 ? x : i == 1 ? ctx : wide, st, i == 0 ? qkv : i == 2 ? wide : x, pa, capacity, tokens); };
        for (int i = 0; i < 4; i++) { std::vector<std::function<void()>> f; for (auto& v : vs) f.push_back([&, i] { for (int l = 0; l < 12; l++) one(v, l, i); }); auto m = race(f, 2, 11); printf("%-8s %-11s", name, NAME[i]); for (double t : m) printf(" %9.2f", t / 12); printf("\n"); CK(cudaMemcpy(x, hx.data(), hx.size() * 2, cudaMemcpyHostToDevice)); CK(cudaMemcpy(wide, hw.data(), hw.size() * 2, cudaMemcpyHostToDevice)); CK(cudaMemcpy(st, hs.data(), hs.size() * 4, cudaMemcpyHostToDevice)); }
        for (int i = 0; i < 2; i++) { // the chain, with either attention
            plan(as[i], pk, lists[i]); CK(cudaStreamSynchronize(S)); std::vector<std::function<void()>> f;
            for (auto& v : vs) f.push_back([&, i] { for (int l = 0; l < 12; l++) { one(v, l, 0); attention(as[i], pk, qkv, ctx, lists[i], table, reach, capacity); one(v, l, 1); join(v, pa, st, pk.starts, pk.lengths, pk.rows, tokens, capacity, l, fault); one(v, l, 2); one(v, l, 3); join(v, pa, st, pk.starts, pk.lengths, pk.rows, tokens, capacity, l, fault); } });
            auto m = race(f, 1, 21); printf("%-8s 12 layers %c", name, i ? 'n' : 'b'); for (double t : m) printf(" %9.1f", t); printf("\n");
        }
        for (void* b : {x, ctx, wide, qkv, st, pa}) cudaFree(b);
    }
    printf("%s\n", bad ? "FAILED" : "done"); return bad != 0;
}
