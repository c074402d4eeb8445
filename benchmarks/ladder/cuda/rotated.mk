# Builds build/rotated/_rotated.so for the H200 without a GPU and without setup.py: the rotated and
# scalar kernels alone, with the launch overrides of AQLM_TUNE. Run from the repository root:
#   make -f benchmarks/ladder/cuda/rotated.mk PYTHON=.venv/bin/python
PYTHON ?= .venv/bin/python
ARCH ?= -gencode arch=compute_90a,code=sm_90a
OUT := build/rotated
TORCH := $(shell $(PYTHON) -c "import torch,os;print(os.path.dirname(torch.__file__))")
PYINC := $(shell $(PYTHON) -c "import sysconfig;print(sysconfig.get_paths()['include'])")
NAMES := $(basename $(notdir $(wildcard csrc/cuda/rotated*.cu csrc/cuda/hadamard*.cu \
  csrc/cuda/mix*.cu csrc/cuda/norm*.cu csrc/cuda/step*.cu \
  csrc/cuda/instances/rotated*.cu)))
OPS := $(addprefix $(OUT)/obj/,ops_cuda_rotated.o ops_cuda_joined.o ops_cuda_step.o)
OBJ := $(NAMES:%=$(OUT)/obj/%.o) $(OUT)/obj/launch.o $(OPS)
HDR := $(wildcard csrc/cuda/rotated* csrc/cuda/scalar* csrc/cuda/e8p* csrc/cuda/hadamard* \
  csrc/cuda/mix* csrc/cuda/norm_rotate.h csrc/cuda/step_rows.h csrc/cuda/ptx.cuh \
  csrc/cuda/numeric.cuh csrc/cuda/enqueue.cuh \
  csrc/cuda/launch.h csrc/cuda/instances/rotated.inl csrc/ops_cuda_common.h csrc/ops_cuda_rotated.h)
VPATH := csrc/cuda:csrc/cuda/instances
NVFLAGS := -O3 $(ARCH) -Xptxas -v -DAQLM_TUNE \
  -Xcompiler -fPIC,-fvisibility=hidden,-ffunction-sections
CUDA_INC := /usr/local/cuda/include

# launch.o is there for device_info: its additive half is dropped.
$(OUT)/_rotated.so: $(OBJ)
	nvcc -shared -cudart static $(ARCH) -Xlinker --gc-sections -o $@ $^ -L$(TORCH)/lib \
	  -ltorch_cpu -lc10 -ldl
$(OUT)/obj/%.o: %.cu $(HDR)
	@mkdir -p $(dir $@)
	nvcc $(NVFLAGS) -c $< -o $@ > $@.log 2>&1 || (cat $@.log; false)
$(OPS): $(OUT)/obj/%.o: csrc/%.cpp $(HDR)
	@mkdir -p $(dir $@)
	g++ -O2 -std=c++17 -fPIC -fvisibility=hidden -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 \
	  -DPy_LIMITED_API=0x030a0000 -I$(TORCH)/include -I$(TORCH)/include/torch/csrc/api/include \
	  -I$(CUDA_INC) -I$(PYINC) -Icsrc -c $< -o $@
