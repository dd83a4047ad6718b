// A CUDA device that computes nothing, for a CPU build of torch: enough of a device guard and of
// CUDA's hooks that FakeTensorMode, autocast and autograd take "cuda" tensors for what they are.
// One device, one stream, no events: everything "runs" in order and at once.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device kDevice(DeviceType::CUDA, 0);
const Stream kStream(Stream::DEFAULT, kDevice);

struct SimulatedGuard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device /*device*/) const override {
    return kDevice;
  }
  Device getDevice() const override {
    return kDevice;
  }
  Stream getStream(Device /*device*/) const noexcept override {
    return kStream;
  }
  Stream getNewStream(Device /*device*/, int /*priority*/) const override {
    return kStream;
  }
  Stream exchangeStream(Stream /*stream*/) const noexcept override {
    return kStream;
  }
  void record(void** /*event*/, const Stream& /*stream*/, DeviceIndex /*index*/, c10::EventFlag /*flag*/)
      const override {}
  void block(void* /*event*/, const Stream& /*stream*/) const override {}
  bool queryEvent(void* /*event*/) const override {
    return true;
  }
};

// torch asks its registry for hooks of this very name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs /*args*/) {}
  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex /*index*/) const override {
    return true;
  }
  int getNumGPUs() const override {
    return 1;
  }
  DeviceIndex deviceCount() const override {
    return 1;
  }
  DeviceIndex current_device() const override {
    return 0;
  }
};

c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new SimulatedGuard());

} // namespace

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
