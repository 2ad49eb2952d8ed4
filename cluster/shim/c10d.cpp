// libtorch's c10d behind a few functions of C, for src/c10d.rs. Nothing throws across: each function that
// can fail returns an outcome and leaves what went wrong in `error`, which the caller gives back to
// c10d_text_free.

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

// The declarations in gloo/ are ours: another size means that libtorch's own have changed and that
// objects made here would not be what libtorch takes them for.
static_assert(sizeof(c10d::ProcessGroupGloo) == 488, "libtorch's ProcessGroupGloo has another layout");
static_assert(alignof(c10d::ProcessGroupGloo) == 8, "libtorch's ProcessGroupGloo has another layout");

namespace {

using Tensors = std::vector<at::Tensor>;
using std::chrono::milliseconds;

// Numbers that src/c10d.rs knows.
enum Outcome : int { DONE = 0, NOT_YET = 1, FAILED = 2 };
enum Operation : int { ALL_REDUCE = 0, BROADCAST = 1, ALL_TO_ALL = 2 };

struct Store {
  c10::intrusive_ptr<c10d::Store> store;
};

struct Group : c10d::ProcessGroupGloo {
  using ProcessGroupGloo::ProcessGroupGloo;

  // Whoever waits here or there for one of these connections gets an error at once.
  void close() {
    for (auto& context : contexts_) context->closeConnections();
  }
};

struct Gloo {
  c10::intrusive_ptr<Group> group;
};

struct Signal {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
};

struct Work {
  c10::intrusive_ptr<c10d::Work> work;
  std::shared_ptr<Signal> signal;
};

char* text(const char* message) {
  return strdup(message == nullptr ? "" : message);
}

// Calls `body` and keeps what it throws.
template <typename Body>
int guarded(char** error, Body body) noexcept {
  try {
    return body();
  } catch (const c10::Error& thrown) {
    *error = text(thrown.what_without_backtrace());
  } catch (const std::exception& thrown) {
    *error = text(thrown.what());
  } catch (...) {
    *error = text("an exception of unknown type");
  }
  return FAILED;
}

std::vector<uint8_t> bytes(const uint8_t* data, size_t length) {
  return std::vector<uint8_t>(data, data + length);
}

void hand_out(const std::vector<uint8_t>& value, uint8_t** data, size_t* length) {
  *data = static_cast<uint8_t*>(malloc(value.size() + 1));
  memcpy(*data, value.data(), value.size());
  *length = value.size();
}

} // namespace

C10_DECLARE_int(caffe2_log_level);

extern "C" {

void c10d_text_free(void* data) {
  free(data);
}

// A store's client, and its server too where `listening` is a socket that listens.
int c10d_store_open(const char* host, uint16_t port, int listening, int64_t timeout_ms,
                    const char* prefix, Store** opened, char** error) {
  // What c10d would warn of comes back as an error, without a page of addresses.
  if (getenv("TORCH_CPP_LOG_LEVEL") == nullptr) FLAGS_caffe2_log_level = 2;
  return guarded(error, [&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = listening >= 0;
    if (listening >= 0) options.masterListenFd = listening;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    auto store = c10::make_intrusive<c10d::TCPStore>(host, options);
    *opened = new Store{c10::make_intrusive<c10d::PrefixStore>(prefix, std::move(store))};
    return DONE;
  });
}

void c10d_store_close(Store* store) {
  char* error = nullptr;
  guarded(&error, [&] { delete store; return DONE; });
  free(error);
}

int c10d_store_set(Store* store, const char* key, const uint8_t* data, size_t length, char** error) {
  return guarded(error, [&] { store->store->set(key, bytes(data, length)); return DONE; });
}

// The value of the key afterwards: `data` if it had none.
int c10d_store_set_first(Store* store, const char* key, const uint8_t* data, size_t length,
                         uint8_t** value, size_t* value_length, char** error) {
  return guarded(error, [&] {
    hand_out(store->store->compareSet(key, {}, bytes(data, length)), value, value_length);
    return DONE;
  });
}

int c10d_store_get(Store* store, const char* key, uint8_t** value, size_t* length, char** error) {
  return guarded(error, [&] { hand_out(store->store->get(key), value, length); return DONE; });
}

int c10d_store_add(Store* store, const char* key, int64_t amount, int64_t* sum, char** error) {
  return guarded(error, [&] { *sum = store->store->add(key, amount); return DONE; });
}

int c10d_store_append(Store* store, const char* key, const uint8_t* data, size_t length, char** error) {
  return guarded(error, [&] { store->store->append(key, bytes(data, length)); return DONE; });
}

// DONE where the key has a value, NOT_YET where it has none.
int c10d_store_has(Store* store, const char* key, char** error) {
  return guarded(error, [&] { return store->store->check({key}) ? DONE : NOT_YET; });
}

// Connections are made through the address `host`, or the interface of that name.
int c10d_gloo_open(Store* store, int rank, int world, const char* host, int is_interface,
                   int64_t timeout_ms, Gloo** opened, char** error) {
  return guarded(error, [&] {
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    options->devices.push_back(
        is_interface ? c10d::ProcessGroupGloo::createDeviceForInterface(host)
                     : c10d::ProcessGroupGloo::createDeviceForHostname(host));
    options->threads = 2;
    *opened = new Gloo{
        c10::make_intrusive<Group>(store->store, rank, world, std::move(options))};
    return DONE;
  });
}

int c10d_gloo_abort(Gloo* group, char** error) {
  return guarded(error, [&] { group->group->close(); return DONE; });
}

void c10d_gloo_close(Gloo* group) {
  char* error = nullptr;
  guarded(&error, [&] { delete group; return DONE; });
  free(error);
}

// Starts an operation on `output` and `input`, which are the same tensor for ALL_REDUCE and BROADCAST.
// `argument` is the way to reduce, or the rank that broadcasts.
int c10d_gloo_start(Gloo* group, int operation, int argument, at::Tensor* output, at::Tensor* input,
                    Work** started, char** error) {
  return guarded(error, [&] {
    Tensors tensors{*output};
    c10::intrusive_ptr<c10d::Work> work;
    switch (operation) {
      case ALL_REDUCE: {
        c10d::AllreduceOptions options;
        options.reduceOp = static_cast<c10d::ReduceOp::RedOpType>(argument);
        work = group->group->allreduce(tensors, options);
        break;
      }
      case ALL_TO_ALL: {
        std::vector<int64_t> equal;
        work = group->group->alltoall_base(*output, *input, equal, equal);
        break;
      }
      default: {
        c10d::BroadcastOptions options;
        options.rootRank = argument;
        work = group->group->broadcast(tensors, options);
      }
    }
    auto signal = std::make_shared<Signal>();
    work->getFuture()->addCallback([signal](c10::ivalue::Future&) {
      std::lock_guard<std::mutex> lock(signal->mutex);
      signal->done = true;
      signal->changed.notify_all();
    });
    *started = new Work{std::move(work), std::move(signal)};
    return DONE;
  });
}

// Waits at most `slice_ms`: DONE where the operation has ended well, NOT_YET where it goes on.
int c10d_work_wait(Work* work, int64_t slice_ms, char** error) {
  return guarded(error, [&] {
    {
      std::unique_lock<std::mutex> lock(work->signal->mutex);
      auto done = [&] { return work->signal->done; };
      if (!work->signal->changed.wait_for(lock, milliseconds(slice_ms), done)) return NOT_YET;
    }
    work->work->wait();
    return DONE;
  });
}

void c10d_work_free(Work* work) {
  char* error = nullptr;
  guarded(&error, [&] { delete work; return DONE; });
  free(error);
}

} // extern "C"
