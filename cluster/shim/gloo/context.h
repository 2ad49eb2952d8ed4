// What c10d's header on Gloo names of it, declared: libtorch's package holds the code of Gloo and not its
// headers. The size of ProcessGroupGloo, asserted in c10d.cpp, says whether these still fit.
#pragma once

#include <chrono>

namespace gloo {

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
  void closeConnections();
};

} // namespace gloo
