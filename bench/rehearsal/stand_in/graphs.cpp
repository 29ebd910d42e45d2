// Captures and graphs. A graph is the number of its nodes: none of them does anything when it is launched.
#include <algorithm>

#include "runtime.h"

namespace rehearsal {
namespace {

int64_t* find(std::set<int64_t*>& among, void* handle, const char* caller) {
    auto* graph = static_cast<int64_t*>(handle);
    if (among.count(graph) > 0) return graph;
    illegal(cudaErrorInvalidValue, std::string(caller) + " of a graph that does not exist");
    return nullptr;
}

cudaError_t destroy(std::set<int64_t*>& among, void* handle, const char* caller) {
    int64_t* graph = find(among, handle, caller);
    if (graph == nullptr) return cudaErrorInvalidValue;
    among.erase(graph);
    delete graph;
    return cudaSuccess;
}

// Whether work of a stream comes before nothing that its origin goes on with.
bool is_left(const Capture& capture, const Stream& stream) {
    const auto number = [&](const Before& before) {
        const auto found = before.find(&stream);
        return found == before.end() ? 0 : found->second;
    };
    return number(capture.origin->before) < number(stream.before);
}

// The default stream may not even be asked while a stream that it waits for is capturing.
cudaError_t may_be_asked(const Stream& stream, const char* caller) {
    if (&stream != &state().default_stream) return cudaSuccess;
    for (auto& [id, capture] : state().captures)
        if (capture->origin->blocking)
            return illegal(cudaErrorStreamCaptureImplicit,
                           std::string(caller) + " of the default stream while another is capturing");
    return cudaSuccess;
}

cudaStreamCaptureStatus status_of(const Stream& stream) {
    if (stream.capture == nullptr) return cudaStreamCaptureStatusNone;
    return stream.capture->spoilt ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

}  // namespace

cudaError_t spoil(Capture& capture, cudaError_t code, const std::string& what) {
    capture.spoilt = true;
    return illegal(code, what);
}

cudaError_t allowed_while_capturing(const char* caller) {
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    bool allowed = true;
    for (auto& [id, capture] : state().captures) {
        const bool own = capture->thread == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
        const bool of_any = thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
        if (!own && !of_any) continue;
        capture->spoilt = true;
        allowed = false;
    }
    return allowed ? cudaSuccess
                   : illegal(cudaErrorStreamCaptureUnsupported, std::string(caller) + " beside a capture");
}

}  // namespace rehearsal

using namespace rehearsal;

extern "C" {

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(thread_mode, *mode);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    const Lock lock;
    Stream* stream = find(handle, "cudaStreamBeginCapture");
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (stream == &state().default_stream)
        return illegal(cudaErrorStreamCaptureUnsupported, "a capture of the default stream");
    if (stream->capture != nullptr) return illegal(cudaErrorIllegalState, "a capture within a capture");
    const unsigned long long id = ++state().last_capture;
    stream->capture = new Capture{mode, std::this_thread::get_id(), stream, {stream}, id};
    stream->before.clear();
    state().captures[id] = stream->capture;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    const Lock lock;
    *graph = nullptr;
    Stream* stream = find(handle, "cudaStreamEndCapture");
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    Capture* capture = stream->capture;
    if (capture == nullptr) return illegal(cudaErrorIllegalState, "the end of a capture that has not begun");
    if (capture->origin != stream)
        return spoil(*capture, cudaErrorStreamCaptureUnmatched, "a capture ends on another stream than it began on");
    if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
        return spoil(*capture, cudaErrorStreamCaptureWrongThread, "a capture ends in another thread than it began in");
    const bool left = std::any_of(capture->streams.begin(), capture->streams.end(),
                                  [&](const Stream* other) { return is_left(*capture, *other); });
    const bool spoilt = capture->spoilt;
    const int64_t nodes = capture->nodes;
    for (Stream* other : capture->streams) {
        other->capture = nullptr;
        other->before.clear();
    }
    state().captures.erase(capture->id);
    delete capture;
    if (spoilt) return illegal(cudaErrorStreamCaptureInvalidated, "the end of a capture that is spoilt");
    if (left) return illegal(cudaErrorStreamCaptureUnjoined, "a capture ends beside work that has not joined it");
    auto* found = new int64_t(nodes);
    state().graphs.insert(found);
    count(kGraphs, "a capture");
    *graph = reinterpret_cast<cudaGraph_t>(found);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    const Lock lock;
    Stream* stream = find(handle, "cudaStreamIsCapturing");
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    *status = status_of(*stream);
    return may_be_asked(*stream, "cudaStreamIsCapturing");
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* number) {
    const Lock lock;
    Stream* stream = find(handle, "cudaStreamGetCaptureInfo");
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    *status = status_of(*stream);
    if (id != nullptr) *id = stream->capture == nullptr ? 0 : stream->capture->id;
    if (graph != nullptr) *graph = nullptr;
    if (dependencies != nullptr) *dependencies = nullptr;
    if (edges != nullptr) *edges = nullptr;
    if (number != nullptr) *number = 0;
    return may_be_asked(*stream, "cudaStreamGetCaptureInfo");
}

cudaError_t cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t*, size_t* number) {
    const Lock lock;
    const int64_t* graph = find(state().graphs, handle, "cudaGraphGetNodes");
    if (graph == nullptr) return cudaErrorInvalidValue;
    *number = static_cast<size_t>(*graph);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t handle, unsigned long long) {
    const Lock lock;
    const int64_t* graph = find(state().graphs, handle, "cudaGraphInstantiate");
    if (graph == nullptr) return cudaErrorInvalidValue;
    auto* made = new int64_t(*graph);
    state().executables.insert(made);
    *executable = reinterpret_cast<cudaGraphExec_t>(made);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    const Lock lock;
    return destroy(state().graphs, graph, "cudaGraphDestroy");
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    const Lock lock;
    return destroy(state().executables, executable, "cudaGraphExecDestroy");
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    const Lock lock;
    if (find(state().executables, executable, "cudaGraphLaunch") == nullptr) return cudaErrorInvalidValue;
    return take(stream, kGraphLaunches, "a graph");
}

}  // extern "C"
