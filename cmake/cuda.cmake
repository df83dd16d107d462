# The extension `_cuda`.

if(POLICY CMP0104)
  cmake_policy(SET CMP0104 NEW)
endif()
# Machine code for the data-centre and consumer generations of today, as far as the toolkit knows them; the others translate the
# assembly code of the oldest when they first run it.
set(choose_architectures OFF)
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(choose_architectures ON)
  set(CMAKE_CUDA_ARCHITECTURES 80)
endif()
enable_language(CUDA)
find_package(CUDAToolkit 12.1 REQUIRED)
if(choose_architectures)
  set(CMAKE_CUDA_ARCHITECTURES 80 90-real)
  if(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12.8)
    list(APPEND CMAKE_CUDA_ARCHITECTURES 100-real 120-real)
  endif()
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

# The same bits as on the CPU: no contraction, IEEE division and square root, float32 denormals flushed.
set(cuda_flags --fmad=false --ftz=true --prec-div=true --prec-sqrt=true)

pybind11_add_module(_cuda NO_EXTRAS
  csrc/cuda/direct.cu
  csrc/cuda/engine.cpp
  csrc/cuda/module.cpp
  csrc/cuda/runtime.cpp
  csrc/cuda/settle.cu
  csrc/cuda/tiles_double.cu
  csrc/cuda/tiles_float.cu)
target_compile_options(_cuda PRIVATE
  "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_flags};--expt-relaxed-constexpr;-Xfatbin=-compress-all>"
  "$<$<COMPILE_LANGUAGE:CXX>:${warning_flags}>")
set_target_properties(_cuda PROPERTIES CUDA_VISIBILITY_PRESET hidden)
target_include_directories(_cuda SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
string(JOIN " " cuda_flags_text ${cuda_flags})
string(JOIN " " cuda_architectures_text ${CMAKE_CUDA_ARCHITECTURES})
target_compile_definitions(_cuda PRIVATE
  GRADSTEP_CUDA_ARCHITECTURES="${cuda_architectures_text}"
  GRADSTEP_CUDA_FLAGS="${cuda_flags_text}")
install(TARGETS _cuda LIBRARY DESTINATION gradstep)
