// What is counted, and what was illegal. The file named by REHEARSAL_ILLEGAL gets a line of each illegal call at once.
#include <cstdio>
#include <cstdlib>

#include "runtime.h"

namespace rehearsal {
namespace {

constexpr size_t kExamples = 8;
constexpr const char* kNames[kCounts] = {
    "launches",           "graph_launches", "copies",           "fills",  "captured", "on_default_stream", "waits",
    "device_allocations", "device_frees",   "host_allocations", "graphs", "illegal",
};

thread_local cudaError_t last_error = cudaSuccess;

std::string quoted(const std::string& text) {
    std::string json = "\"";
    for (const char c : text) json += c == '"' || c == '\\' ? std::string{'\\', c} : std::string{c};
    return json + '"';
}

}  // namespace

State& state() {
    static State& only = *new State;
    return only;
}

void count(Count which, const char* what) {
    State& now = state();
    ++now.counts[which];
    if (now.examples[which].size() < kExamples) now.examples[which].emplace_back(what);
}

cudaError_t failed(cudaError_t code) {
    last_error = code;
    return code;
}

cudaError_t illegal(cudaError_t code, const std::string& what) {
    const std::string line = what + " (CUDA error " + std::to_string(code) + ")";
    count(kIllegal, line.c_str());
    std::fprintf(stderr, "illegal: %s\n", line.c_str());
    if (const char* path = std::getenv("REHEARSAL_ILLEGAL")) {
        if (std::FILE* file = std::fopen(path, "a")) {
            std::fprintf(file, "%s\n", line.c_str());
            std::fclose(file);
        }
    }
    return failed(code);
}

}  // namespace rehearsal

using namespace rehearsal;

extern "C" {

cudaError_t cudaGetLastError() {
    const cudaError_t code = last_error;
    last_error = cudaSuccess;
    return code;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

// JSON: every count, examples of each, and the streams that were given work.
const char* rehearsal_counts() {
    const Lock lock;
    static std::string text;
    std::string examples, streams;
    text = "{";
    for (int which = 0; which < kCounts; ++which) {
        text += quoted(kNames[which]) + ": " + std::to_string(state().counts[which]) + ", ";
        examples += (which ? ", " : "") + quoted(kNames[which]) + ": [";
        for (const std::string& example : state().examples[which])
            examples += (&example == &state().examples[which][0] ? "" : ", ") + quoted(example);
        examples += "]";
    }
    for (const Stream* stream : state().streams)
        if (stream->work > 0)
            streams += (streams.empty() ? "" : ", ") + std::to_string(reinterpret_cast<uintptr_t>(stream));
    text += "\"examples\": {" + examples + "}, \"streams\": [" + streams + "]}";
    return text.c_str();
}

void rehearsal_reset() {
    const Lock lock;
    for (int which = 0; which < kCounts; ++which) {
        state().counts[which] = 0;
        state().examples[which].clear();
    }
    for (Stream* stream : state().streams) stream->work = 0;
}

}  // extern "C"
