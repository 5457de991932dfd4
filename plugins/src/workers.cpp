#include "workers.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace asag {
namespace {

// How often a caller looks whether the others have ended before it sleeps: some tens of microseconds.
constexpr int LOOKS = 2000;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// A job that is being done.
struct Shared {
    const Job& job;
    std::atomic<int64_t> next{0};
    std::atomic<int> busy{0};  // workers that are at it, besides the caller
    int joined = 0;
    int wanted;

    void work(int worker) {
        for (;;) {
            const int64_t begin = next.fetch_add(job.part, std::memory_order_relaxed);
            if (begin >= job.count) return;
            job.run(job.work, worker, begin, std::min(begin + job.part, job.count));
        }
    }
};

class Pool {
public:
    void share_out(const Job& job, int threads) {
        Shared shared{job, {}, {}, 0, threads - 1};
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            open_.push_back(&shared);
            int wanted = -idle_;
            for (const Shared* each : open_) wanted += each->wanted;
            while (wanted > 0 && start()) --wanted;
        }
        for (int i = 1; i < threads; ++i) there_is_work_.notify_one();
        shared.work(0);
        std::unique_lock<std::mutex> lock(mutex_);
        open_.erase(std::remove(open_.begin(), open_.end(), &shared), open_.end());
        if (shared.busy == 0) return;
        lock.unlock();
        for (int i = 0; i < LOOKS; ++i) {
            if (shared.busy.load(std::memory_order_acquire) == 0) break;
            pause();
        }
        lock.lock();
        one_has_ended_.wait(lock, [&] { return shared.busy == 0; });
    }

private:
    // Starts a worker, which does not take signals that are meant for the program; false if none may be started.
    bool start() {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        bool started = true;
        try {
            std::thread([this] { work(); }).detach();
            ++idle_;
        } catch (const std::system_error&) {
            started = false;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return started;
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            there_is_work_.wait(lock, [&] { return !open_.empty(); });
            Shared& shared = *open_.front();
            if (--shared.wanted == 0) open_.erase(open_.begin());
            const int worker = ++shared.joined;
            ++shared.busy;
            --idle_;
            lock.unlock();
            shared.work(worker);
            lock.lock();
            ++idle_;
            if (--shared.busy == 0) one_has_ended_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable there_is_work_, one_has_ended_;
    std::vector<Shared*> open_;  // that want more workers
    int idle_ = 0;
};

// Never destroyed, since its workers wait in it until the process ends.
alignas(Pool) unsigned char memory[sizeof(Pool)];

Pool& pool() {
    static Pool* const made = [] {
        Pool* const first = new (memory) Pool;
        // The child of a fork has none of the workers, and the lock may have been another thread's.
        pthread_atfork(nullptr, nullptr, [] { new (memory) Pool; });
        return first;
    }();
    return *made;
}

}  // namespace

void share_out(const Job& job, int threads) { pool().share_out(job, threads); }

}  // namespace asag
