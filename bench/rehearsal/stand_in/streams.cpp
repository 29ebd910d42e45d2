// Streams and events. Work is done when it is given, so that whoever waits may go on at once.
#include <algorithm>

#include "runtime.h"

namespace rehearsal {
namespace {

void merge(Before& into, const Before& from) {
    for (const auto& [stream, work] : from) into[stream] = std::max(into[stream], work);
}

Event* find_event(cudaEvent_t handle, const char* caller) {
    auto* event = reinterpret_cast<Event*>(handle);
    if (state().events.count(event) > 0) return event;
    illegal(cudaErrorInvalidResourceHandle, std::string(caller) + " of an event that does not exist");
    return nullptr;
}

// The capture that an event was last recorded in, while it goes on.
Capture* capture_of(const Event& event) {
    const auto found = state().captures.find(event.capture);
    return found == state().captures.end() ? nullptr : found->second;
}

cudaError_t asked(cudaEvent_t handle, const char* caller) {
    Event* event = find_event(handle, caller);
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    if (event->capture == 0) return allowed_while_capturing(caller);
    if (Capture* capture = capture_of(*event)) capture->spoilt = true;
    return illegal(cudaErrorCapturedEvent, std::string(caller) + " of an event that a capture recorded");
}

cudaError_t asked(cudaStream_t handle, const char* caller) {
    Stream* stream = find(handle, caller);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (stream->capture != nullptr)
        return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported,
                     std::string(caller) + " of a stream that is capturing");
    return allowed_while_capturing(caller);
}

}  // namespace

Stream* find(cudaStream_t handle, const char* caller) {
    if (handle == nullptr || handle == cudaStreamLegacy) return &state().default_stream;
    if (handle == cudaStreamPerThread) return &state().thread_stream;
    auto* stream = reinterpret_cast<Stream*>(handle);
    if (state().streams.count(stream) > 0) return stream;
    illegal(cudaErrorInvalidResourceHandle, std::string(caller) + " on a stream that does not exist");
    return nullptr;
}

cudaError_t take(cudaStream_t handle, Count kind, const char* what, bool& now) {
    Stream* stream = find(handle, what);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (Capture* capture = stream->capture) {
        if (capture->spoilt)
            return illegal(cudaErrorStreamCaptureInvalidated, std::string(what) + " in a capture that is spoilt");
        stream->before[stream] = ++capture->nodes;
        count(kCaptured, what);
        return cudaSuccess;
    }
    if (stream == &state().default_stream) {
        for (auto& [id, capture] : state().captures)
            if (capture->origin->blocking)
                return spoil(*capture, cudaErrorStreamCaptureImplicit,
                             std::string(what) + " on the default stream while another is capturing");
        count(kOnDefaultStream, what);
    }
    count(kind, what);
    ++stream->work;
    now = true;
    return cudaSuccess;
}

cudaError_t take(cudaStream_t handle, Count kind, const char* what) {
    bool now = false;
    return take(handle, kind, what, now);
}

}  // namespace rehearsal

using namespace rehearsal;

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
    const Lock lock;
    auto* stream = new Stream{(flags & cudaStreamNonBlocking) == 0, priority};
    state().streams.insert(stream);
    *handle = reinterpret_cast<cudaStream_t>(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
    return cudaStreamCreateWithPriority(handle, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    const Lock lock;
    Stream* stream = find(handle, "cudaStreamDestroy");
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (state().streams.erase(stream) > 0) delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
    const Lock lock;
    Stream* stream = find(handle, "cudaStreamGetPriority");
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    *priority = stream->priority;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    const Lock lock;
    count(kWaits, "cudaStreamSynchronize");
    return asked(handle, "cudaStreamSynchronize");
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    const Lock lock;
    return asked(handle, "cudaStreamQuery");
}

cudaError_t cudaDeviceSynchronize() {
    const Lock lock;
    count(kWaits, "cudaDeviceSynchronize");
    return allowed_while_capturing("cudaDeviceSynchronize");
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
    const Lock lock;
    auto* event = new Event{(flags & cudaEventDisableTiming) == 0};
    state().events.insert(event);
    *handle = reinterpret_cast<cudaEvent_t>(event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    const Lock lock;
    Event* event = find_event(handle, "cudaEventDestroy");
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    state().events.erase(event);
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned) {
    const Lock lock;
    Event* event = find_event(handle, "cudaEventRecord");
    Stream* stream = find(stream_handle, "cudaEventRecord");
    if (event == nullptr || stream == nullptr) return cudaErrorInvalidResourceHandle;
    event->recorded = true;
    event->moment = std::chrono::steady_clock::now();
    event->capture = stream->capture == nullptr ? 0 : stream->capture->id;
    event->before = stream->before;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    const Lock lock;
    count(kWaits, "cudaEventSynchronize");
    return asked(handle, "cudaEventSynchronize");
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
    const Lock lock;
    return asked(handle, "cudaEventQuery");
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    const Lock lock;
    Event *first = find_event(from, "cudaEventElapsedTime"), *last = find_event(to, "cudaEventElapsedTime");
    if (first == nullptr || last == nullptr) return cudaErrorInvalidResourceHandle;
    for (const Event* event : {first, last})
        if (!event->timed || !event->recorded)
            return illegal(cudaErrorInvalidResourceHandle, "the time of an event that has none");
    // Never 0, which nothing can be divided by.
    *milliseconds = std::chrono::duration<float, std::milli>(last->moment - first->moment).count() + 1e-3f;
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned) {
    const Lock lock;
    Event* event = find_event(handle, "cudaStreamWaitEvent");
    Stream* stream = find(stream_handle, "cudaStreamWaitEvent");
    if (event == nullptr || stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (!event->recorded) return cudaSuccess;
    Capture* capture = capture_of(*event);
    if (stream->capture != nullptr && stream->capture != capture)
        return spoil(*stream->capture, cudaErrorStreamCaptureIsolation,
                     "a stream that is capturing waits for work outside of its capture");
    if (capture == nullptr) return cudaSuccess;
    if (stream == &state().default_stream)
        return spoil(*capture, cudaErrorStreamCaptureImplicit, "the default stream waits for work that is captured");
    stream->capture = capture;
    capture->streams.insert(stream);
    merge(stream->before, event->before);
    return cudaSuccess;
}

}  // extern "C"
