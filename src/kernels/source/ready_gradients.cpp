#include "ready_gradients.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <vector>

namespace acnet {
namespace {

struct ReadyGradient {
    char layer[64];
    int64_t output;
    const void *data;
};

struct ReadyList {
    std::mutex mutex;
    std::condition_variable changed;
    bool enabled = false;
    std::vector<ReadyGradient> gradients;
};

ReadyList &ready_list() {
    static ReadyList *const value = new ReadyList;
    return *value;
}

}  // namespace

void gradient_ready(const Arguments &arguments, int output, const void *data) {
    ReadyList &list = ready_list();
    std::lock_guard<std::mutex> lock(list.mutex);
    if (!list.enabled) return;
    ReadyGradient gradient{{}, output, data};
    std::strncpy(gradient.layer, arguments.layer(), sizeof gradient.layer - 1);
    list.gradients.push_back(gradient);
    list.changed.notify_all();
}

}  // namespace acnet

// Clears the list, and starts notifications (`enabled` is 1) or stops them (0).
extern "C" int acnet_enable_ready_gradients(int enabled) {
    return acnet::guarded("", "enable_ready_gradients", [&] {
        auto &list = acnet::ready_list();
        std::lock_guard<std::mutex> lock(list.mutex);
        list.enabled = enabled;
        list.gradients.clear();
    });
}

// Copies the gradients after the first `seen`, at most `capacity`, waiting up to `seconds` for one.
// Returns how many were copied, or -1 with acnet_last_error.
extern "C" int acnet_ready_gradients(int seen, int capacity, double seconds,
                                     acnet::ReadyGradient *to) {
    int count = 0;
    int failed = acnet::guarded("", "ready_gradients", [&] {
        auto &list = acnet::ready_list();
        std::unique_lock<std::mutex> lock(list.mutex);
        auto size = [&] { return static_cast<int>(list.gradients.size()); };
        list.changed.wait_for(lock, std::chrono::duration<double>(seconds),
                              [&] { return size() > seen; });
        count = std::min(std::max(size() - seen, 0), capacity);
        if (count > 0) std::copy_n(list.gradients.begin() + seen, count, to);
    });
    return failed ? -1 : count;
}
