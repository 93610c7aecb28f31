// One cache for primitives and packed weights.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace acnet {

using Key = std::vector<int64_t>;

// At most `capacity` values; the least recently used one is dropped first. Values are immutable and
// shared, so a dropped one lives on while a kernel uses it. Thread-safe.
template <class Value>
class Cache {
public:
    using Pointer = std::shared_ptr<const Value>;

    explicit Cache(size_t capacity) : capacity_(capacity) {}

    // The value, or null.
    Pointer find(const Key &key) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto entry = entries_.find(key);
        if (entry == entries_.end()) return nullptr;
        order_.splice(order_.begin(), order_, entry->second.second);
        return entry->second.first;
    }

    // Stores a value, in place of an earlier one of the same key.
    Pointer put(const Key &key, Pointer value) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto [entry, is_new] = entries_.try_emplace(key);
        if (is_new) {
            order_.push_front(&entry->first);
            entry->second.second = order_.begin();
        }
        entry->second.first = value;
        while (entries_.size() > capacity_) {
            auto oldest = entries_.find(*order_.back());
            order_.pop_back();
            entries_.erase(oldest);
        }
        return value;
    }

    // `create` runs outside the lock, because it compiles; two threads may both do so once.
    template <class Create>
    Pointer get_or_create(const Key &key, Create create) {
        if (Pointer value = find(key)) return value;
        return put(key, std::make_shared<const Value>(create()));
    }

private:
    using Order = std::list<const Key *>;
    const size_t capacity_;
    std::mutex mutex_;
    std::map<Key, std::pair<Pointer, Order::iterator>> entries_;
    Order order_;
};

// The one cache for values of this type; `Tag` tells several apart.
template <class Value>
Cache<Value> &cache() {
    // Never destroyed: threads of MindSpore may still compute while the process ends.
    static auto *const value = new Cache<Value>(1024);
    return *value;
}

}  // namespace acnet
