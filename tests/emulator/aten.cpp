// PyTorch's ops on the fake CUDA device (runtime.c): those of the CPU, on the same memory. What allocates, views
// or reads a number stays CUDA's own, and so do its allocator, streams and graphs.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <set>
#include <string>

extern "C" int fake_device_capturing();
extern "C" void fake_device_record(void (*run)(void*), void* data);

namespace {

using Stack = torch::jit::Stack;

const std::set<std::string> kCudaOwn = {"empty",       "empty_strided", "set_",
                                        "resize_",     "record_stream", "is_pinned",
                                        "_pin_memory", "is_set_to",     "_local_scalar_dense"};
// CUDA's choice among libraries that are not here; without a CPU kernel of their own.
const std::set<std::string> kComposite = {"convolution", "convolution_backward", "copy_"};

// The same memory as a tensor of the CPU, of its whole storage, so that it can be viewed and written alike.
at::Tensor on_host(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  const auto options = t.options().device(at::kCPU);
  if (t.numel() == 0) return at::empty(t.sizes(), options);
  const int64_t bytes = t.storage().nbytes();
  const auto whole = at::from_blob(t.storage().mutable_data(), {bytes}, [t](void*) {}, at::kByte);
  return at::empty({0}, options).set_(whole.storage(), t.storage_offset(), t.sizes(), t.strides());
}

at::Tensor on_device(const at::Tensor& t) {
  if (!t.defined() || t.is_cuda()) return t;
  const auto result = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCUDA));
  on_host(result).copy_(t);
  return result;
}

// The op's arguments at the stack's end become its results.
void by_the_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard without_autograd(c10::autograd_dispatch_keyset);
  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<std::pair<at::Tensor, at::Tensor>> given;  // on the device, on the host
  const auto lend = [&](const at::Tensor& t) {
    auto lent = on_host(t);
    if (t.defined() && t.is_cuda()) given.emplace_back(t, lent);
    return lent;
  };
  const auto count = op.schema().arguments().size();
  Stack host;
  for (const auto& value : torch::jit::last(*stack, count)) {
    if (value.isTensor()) {
      host.emplace_back(lend(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(lend(t));
      host.emplace_back(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor> t : value.toOptionalTensorList())
        list.push_back(t ? std::optional(lend(*t)) : t);
      host.emplace_back(list);
    } else if (value.isDevice()) {
      host.emplace_back(value.toDevice().is_cuda() ? at::Device(at::kCPU) : value.toDevice());
    } else {
      host.push_back(value.isGenerator() ? c10::IValue() : value);
    }
  }
  op.callBoxed(&host);
  for (const auto& [device, lent] : given) {  // results that an op was given, and made larger
    if (device.sizes() == lent.sizes()) continue;
    device.resize_(lent.sizes());
    on_host(device).copy_(lent);
  }
  const auto give_back = [&](const at::Tensor& t) {
    for (const auto& [device, lent] : given)
      if (t.defined() && lent.is_same(t)) return device;
    return on_device(t);
  };
  torch::jit::drop(*stack, count);
  for (const auto& value : host) {
    if (value.isTensor()) {
      stack->emplace_back(give_back(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(give_back(t));
      stack->emplace_back(list);
    } else {
      stack->push_back(value);
    }
  }
}

struct Recorded {
  c10::OperatorHandle op;
  Stack arguments, results;
};

void replay(void* data) {
  const auto& recorded = *static_cast<Recorded*>(data);
  Stack stack = recorded.arguments;
  by_the_cpu(recorded.op, &stack);
  for (size_t i = 0; i < stack.size(); ++i) {
    if (!stack[i].isTensor() || !stack[i].toTensor().defined()) continue;
    const auto into = recorded.results[i].toTensor(), from = stack[i].toTensor();
    if (!into.is_same(from)) on_host(into).copy_(on_host(from));
  }
}

void run(const c10::OperatorHandle& op, Stack* stack) {
  if (!fake_device_capturing()) return by_the_cpu(op, stack);
  Stack arguments = torch::jit::last(*stack, op.schema().arguments().size()).vec();
  for (const auto& value : arguments)
    TORCH_CHECK(
        !value.isTensor() || !value.toTensor().defined() || value.toTensor().is_cuda() || value.toTensor().dim() == 0,
        op.schema().name(), " reaches for the host's memory while a CUDA graph is captured");
  by_the_cpu(op, stack);
  Stack results = torch::jit::last(*stack, op.schema().returns().size()).vec();
  fake_device_record(replay, new Recorded{op, arguments, results});
}

}  // namespace

extern "C" void fake_device_install() {
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    const auto op = dispatcher.findSchema(name);
    const std::string plain = name.name.substr(6);
    if (!op || kCudaOwn.count(plain)) continue;
    const bool both = op->hasKernelForDispatchKey(c10::DispatchKey::CUDA) &&
                      op->hasComputedKernelForDispatchKey(c10::DispatchKey::CPU);
    bool view = false;
    for (const auto& result : op->schema().returns())
      view |= result.alias_info() != nullptr && !result.alias_info()->isWrite();
    if ((both || kComposite.count(plain)) && !view)
      library.impl((plain + (name.overload_name.empty() ? "" : "." + name.overload_name)).c_str(),
                   torch::CppFunction::makeFromBoxedFunction<&run>());
  }
}
