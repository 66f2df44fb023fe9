// The Python module fastllm._C. Importing it loads the shared library, and every file of csrc/ that
// has ops registers them under torch.ops.fastllm_cpu as it is loaded. What is not an op, ZeRO's
// engine, is bound here.
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "engine.h"

namespace {

using namespace fastllm;
namespace py = pybind11;
using Release = py::call_guard<py::gil_scoped_release>;

Group group_of(const py::object& group) {
  if (group.is_none()) return Group();
  return Group::unsafe_reclaim_from_nonowning(group.cast<c10d::ProcessGroup*>());
}

// An engine may hold the last reference to a process group, whose destructor waits for threads that
// may themselves wait for the GIL.
struct WithoutGil {
  void operator()(Engine* engine) const {
    const py::gil_scoped_release release;
    delete engine;
  }
};
using Owner = std::unique_ptr<Engine, WithoutGil>;

// A Python callable as a listener; an empty text comes as None.
Listener listener(py::object callable) {
  if (callable.is_none()) return nullptr;
  // The last owner of the callable may be a C++ thread without the GIL.
  const std::shared_ptr<py::object> kept(new py::object(std::move(callable)), [](py::object* p) {
    const py::gil_scoped_acquire gil;
    delete p;
  });
  return [kept](const std::string& what) {
    const py::gil_scoped_acquire gil;
    if (what.empty()) {
      (*kept)(py::none());
    } else {
      (*kept)(what);
    }
  };
}

Owner make_engine(int64_t rank, int64_t world, const py::object& gather,
                  const py::object& reduce, const py::object& options, py::object watch) {
  EngineOptions chosen;
  chosen.wire = options.attr("wire").cast<std::string>();
  chosen.param_wire = options.attr("param_wire").cast<std::string>();
  chosen.scale = options.attr("scale").cast<double>();
  chosen.native = options.attr("native").cast<bool>();
  chosen.gather_grads = options.attr("gather_grads").cast<bool>();
  chosen.release = options.attr("release").cast<bool>();
  chosen.host_shards = options.attr("host_shards").cast<bool>();
  chosen.in_flight = options.attr("in_flight").cast<int64_t>();
  Owner engine(new Engine(group_of(gather), group_of(reduce), rank, world, chosen));
  engine->watch = listener(std::move(watch));
  return engine;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers the ops of torch.ops.fastllm_cpu; ZeRO's engine";
  py::class_<Layout>(m, "Layout")
      .def_readonly("sizes", &Layout::sizes)
      .def_readonly("begins", &Layout::begins)
      .def_readonly("shard", &Layout::shard)
      .def_readonly("world", &Layout::world)
      .def_property_readonly("padded", &Layout::padded);
  py::class_<Engine, Owner>(m, "Engine", "See fastllm.dist.python_engine.PythonEngine")
      .def(py::init(&make_engine), py::arg("rank"), py::arg("world"), py::arg("gather_group"),
           py::arg("reduce_group"), py::arg("options"), py::arg("watch") = py::none())
      .def_property_readonly_static("kind", [](const py::object&) { return "cpp"; })
      .def_readwrite("local", &Engine::local)
      .def_readwrite("exact", &Engine::exact)
      .def_property(
          "check", [](const Engine& self) { return static_cast<bool>(self.check); },
          [](Engine& self, py::object callable) { self.check = listener(std::move(callable)); })
      .def_property_readonly("sent_bytes", &Engine::sent_bytes)
      .def("add", &Engine::add, Release())
      .def("layout", [](Engine& self, int64_t n) { return self.bucket(n).flat().layout(); })
      .def("shard", [](Engine& self, int64_t n) { return self.bucket(n).flat().shard(); })
      .def("full", [](Engine& self, int64_t n) { return self.bucket(n).flat().full(); })
      .def("grad", [](Engine& self, int64_t n) { return self.bucket(n).grad(); })
      .def("whole_grad", [](Engine& self, int64_t n) { return self.bucket(n).whole_grad(); })
      .def("complete", &Engine::complete, Release())
      .def("close_round", &Engine::close_round, Release())
      .def("finish", &Engine::finish, Release())
      .def("zero", &Engine::zero, Release())
      .def("gather_start", &Engine::gather_start, Release())
      .def("gather_wait", &Engine::gather_wait, Release())
      .def("release", &Engine::release, Release())
      .def("publish", &Engine::publish, Release())
      .def("close", &Engine::close, Release());
}
