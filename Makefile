# Makefile: builds bnb's programs, library and tests with GNU make and any C11/C++17 compiler.
#
#   make                 main quantize inspect bench perplexity
#   make CUDA=1          the same for NVIDIA GPUs, too: needs nvcc; CUDA_ARCH="75 80 90a"
#   make HIP=1           the same for AMD GPUs, too: needs hipcc; HIP_ARCH="gfx90a gfx1030"
#   make demo            builds ./main and generates text with the model in models/demo
#   make test            builds and runs all tests; the last line is "N passed, N failed"
#   make asan            the same tests with address and undefined-behaviour checks
#   make tsan            the tests about threads, with data-race checks
#   make hip-on-cpu      the kernels for AMD GPUs on the CPU, in waves of 32 and of 64 lanes
#   make aarch64         the library's tests for ARM, cross-compiled and run under qemu
#   make fuzz            random files for the readers, with clang's libFuzzer; FUZZ_SECONDS=60 for each of tests/fuzz
#   make install         programs, headers, libbnb.a, pkg-config and CMake files; PREFIX=/usr/local DESTDIR=
#   make clean
#
# What it will not do: detect your CPU. bnb.c picks its fast kernels when it runs, so no -march is needed.
# make test, demo and the library need the header nlohmann/json.hpp, the tests also doctest/doctest.h: if the compiler
# does not find one, Debian's package is installed (with sudo where you are not root).

PROGRAMS = main quantize inspect bench perplexity
VERSION := $(shell sed -n 's/^\#define BNB_VERSION "\(.*\)"/\1/p' bnb.h)

CFLAGS ?= -O2
CXXFLAGS ?= -O2
PREFIX ?= /usr/local

# A variant of the build (asan, tsan, aarch64) is this Makefile again with other values of these.
BUILD = build
BIN = .
EXTRA =
RUN =
TESTARGS =

WARNINGS = -Wall -Wextra
SECTIONS = -ffunction-sections -fdata-sections# the linker drops what a program does not use
COMPILE_C = $(CC) $(CFLAGS) $(WARNINGS) $(SECTIONS) $(EXTRA) $(DEVICES) $(CPPFLAGS) -MMD -MP
COMPILE_CXX = $(CXX) -std=c++17 $(CXXFLAGS) $(WARNINGS) $(SECTIONS) $(EXTRA) $(CPPFLAGS) -MMD -MP
LINK = $(CXX) $(EXTRA) $(LDFLAGS) -Wl,--gc-sections

LIBRARY_OBJECTS = $(BUILD)/bnb.o $(patsubst %.cpp,$(BUILD)/%.o,$(wildcard models/*.cpp))
TEST_OBJECTS = $(patsubst %.cpp,$(BUILD)/%.o,tests/main.cpp $(wildcard tests/test_*.cpp)) $(patsubst %.c,$(BUILD)/%.o,$(wildcard tests/*.c))
TEST = $(BUILD)/test/bnb-test
TOOLS = $(patsubst tests/%.cpp,$(BUILD)/test/%,$(wildcard tests/tool_*.cpp))# of the scripts in tests/golden
FUZZERS = $(wildcard tests/fuzz/fuzz_*.cpp)
FUZZ_SECONDS = 60
CLANG = clang

# ---- devices: a file, a macro for bnb.c and libraries each. CUDA_ARCH: what to build for; the last one without a letter
# also as PTX, which newer GPUs' drivers translate ----

ifneq ($(CUDA),)
NVCC ?= nvcc
CUDA_ARCH ?= 75 80 90a
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(shell command -v $(NVCC))))
NVCCFLAGS ?= -O3
PTX_ARCH = $(lastword $(filter-out %a %f,$(CUDA_ARCH)))
GENCODE = $(foreach a,$(CUDA_ARCH),-gencode arch=compute_$(a),code=sm_$(a)) $(foreach a,$(PTX_ARCH),-gencode arch=compute_$(a),code=compute_$(a))
LIBRARY_OBJECTS += $(BUILD)/bnb-cuda.o
DEVICES += -DBNB_CUDA
LIBS += -L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt
endif

# HIP_ARCH: every GPU that Debian 12's hipcc knows. Newer GPUs need a newer ROCm, and their names here.
ifneq ($(HIP),)
HIPCC ?= hipcc
HIP_ARCH ?= gfx900 gfx906 gfx908 gfx90a gfx90c gfx1010 gfx1011 gfx1012 gfx1030 gfx1031 gfx1032 gfx1035 gfx1036
HIP_HOME ?= $(patsubst %/bin/hipcc,%,$(realpath $(shell command -v $(HIPCC))))
HIPFLAGS ?= -O3
LIBRARY_OBJECTS += $(BUILD)/bnb-hip.o
DEVICES += -DBNB_HIP
LIBS += -L$(HIP_HOME)/lib -lamdhip64
endif

# Use all cores; a -j on the command line wins, and a variant's make shares with the make that called it.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 1)
endif

all: $(PROGRAMS:%=$(BIN)/%)

# ---- compile: objects and their dependency lists (.d) go to $(BUILD) -----------------------------------------------

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(COMPILE_C) -c $< -o $@

$(BUILD)/%.o: %.cpp
	@mkdir -p $(@D)
	$(COMPILE_CXX) -c $< -o $@

$(BUILD)/bnb-cuda.o: bnb-cuda.cu bnb.h
	@mkdir -p $(@D)
	$(NVCC) -std=c++17 $(NVCCFLAGS) $(GENCODE) -Xcompiler "$(WARNINGS) $(EXTRA)" -c $< -o $@

$(BUILD)/bnb-hip.o: bnb-hip.cpp
	@mkdir -p $(@D)
	$(HIPCC) -std=c++17 $(HIPFLAGS) $(HIP_ARCH:%=--offload-arch=%) $(WARNINGS) $(EXTRA) -MMD -MP -c $< -o $@

# What reads options, JSON and pickles runs once: there, size counts.
$(patsubst %,$(BUILD)/models/%.o,checkpoint files hf_config hf_writer pytorch quant_state safetensors tokenizer_json) \
$(PROGRAMS:%=$(BUILD)/examples/%.o): CXXFLAGS += -Os

# Compiling the tests takes longer than running them.
$(TEST_OBJECTS): CXXFLAGS += -O1

# The devices of the last build: written, and so newer than what depends on them, only where they are others now.
FOR_DEVICES = $(DEVICES) $(CUDA_ARCH) $(HIP_ARCH)
$(BUILD)/devices: always
	@mkdir -p $(@D)
	@echo '$(FOR_DEVICES)' | cmp -s - $@ || echo '$(FOR_DEVICES)' > $@
$(BUILD)/bnb.o $(BUILD)/bnb-cuda.o $(BUILD)/bnb-hip.o: $(BUILD)/devices

$(BUILD)/libbnb.a: $(LIBRARY_OBJECTS)
	@rm -f $@
	$(AR) rcs $@ $^

$(PROGRAMS:%=$(BIN)/%): $(BIN)/%: $(BUILD)/examples/%.o $(BUILD)/libbnb.a
	@mkdir -p $(@D)
	$(LINK) $^ -o $@ $(LIBS) -lm -pthread

$(TEST): $(TEST_OBJECTS) $(BUILD)/libbnb.a
	@mkdir -p $(@D)
	$(LINK) $^ -o $@ $(LIBS) -lm -pthread

$(TOOLS): $(BUILD)/test/%: $(BUILD)/tests/%.o $(BUILD)/libbnb.a
	@mkdir -p $(@D)
	$(LINK) $^ -o $@ -lm -pthread

$(BUILD)/fuzz/%: $(BUILD)/tests/fuzz/%.o $(BUILD)/libbnb.a
	@mkdir -p $(@D)
	$(LINK) -fsanitize=fuzzer $^ -o $@ $(LIBS) -lm -pthread

-include $(filter-out $(BUILD)/bnb-cuda.d,$(LIBRARY_OBJECTS:.o=.d)) $(TEST_OBJECTS:.o=.d) $(PROGRAMS:%=$(BUILD)/examples/%.d)

# ---- headers from packages -----------------------------------------------------------------------------------------

$(filter $(BUILD)/models/%,$(LIBRARY_OBJECTS)): | $(BUILD)/have/nlohmann-json3-dev
$(TEST_OBJECTS): | $(BUILD)/have/doctest-dev $(BUILD)/have/nlohmann-json3-dev
$(BUILD)/have/doctest-dev: | $(BUILD)/have/nlohmann-json3-dev# one after the other: apt-get locks
$(BUILD)/have/nlohmann-json3-dev: HEADER = nlohmann/json.hpp
$(BUILD)/have/doctest-dev: HEADER = doctest/doctest.h

SUDO = $(shell [ "$$(id -u)" = 0 ] || echo sudo)

$(BUILD)/have/%:
	@echo '#include <$(HEADER)>' | $(CXX) $(CPPFLAGS) -std=c++17 -x c++ -E - >/dev/null 2>&1 || { \
	    echo "The header $(HEADER) is missing: installing the package $*"; \
	    command -v apt-get >/dev/null || { echo "There is no apt-get here: please install $(HEADER) yourself"; exit 1; }; \
	    $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends $*; }
	@mkdir -p $(@D) && touch $@

# ---- use -----------------------------------------------------------------------------------------------------------

demo: $(BIN)/main
	$(BIN)/main -m models/demo/demo-nf4.bnb -p "And God said" -n 100 --seed 1

test: all $(TEST) $(TOOLS)
	BNB_BIN_DIR=$(BIN) $(RUN) $(TEST) $(TESTARGS)

test-library: $(TEST)
	$(RUN) $(TEST) --test-suite-exclude=cli,embed $(TESTARGS)

# -g1: lines are what reports need; all of -g takes a third of the compiler's time.
asan:
	+$(MAKE) test BUILD=build/asan BIN=build/asan CFLAGS="-O1 -g1" CXXFLAGS="-O1 -g1" \
	    EXTRA="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" \
	    TESTARGS="--test-suite-exclude=embed $(TESTARGS)"

tsan:
	+$(MAKE) test-library BUILD=build/tsan CFLAGS="-O1 -g1" CXXFLAGS="-O1 -g1" EXTRA="-fsanitize=thread" \
	    TESTARGS="--test-case=*thread* $(TESTARGS)"

# bnb-hip.cpp by the host's compiler, with tests/hip-on-cpu as HIP: two sizes of waves, three orders of what is not
# ordered, once with sanitizers. All comparisons in one order; the runs of others share them, without large products,
# which are slow here and no different in another order.
hip-on-cpu:
	+$(MAKE) hip-on-cpu-run BUILD=build/hip-on-cpu DEVICES=-DBNB_HIP

HIP_ON_CPU_64 = -DEMU_WAVE=64
HIP_ON_CPU_32 = -DEMU_WAVE=32
HIP_ON_CPU_asan = -DEMU_WAVE=32 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
HIP_TESTS = $(patsubst %,$(BUILD)/test/hip-%,64 32 asan)

# The slowest first, so that it does not run alone in the end.
hip-on-cpu-run: hip-asan-2-share-0 hip-64-0 hip-32-0 hip-64-1-share-1 hip-64-2-share-2 hip-32-1-share-3 hip-32-2-share-4
hip-%: $(HIP_TESTS)# hip-TEST-ORDER or hip-TEST-ORDER-share-I
	EMU_SCHED=$(word 2,$(subst -, ,$*)) BNB_TEST_DEVICE=hip $(if $(findstring share,$*),BNB_TEST_SHARE=$(lastword $(subst -, ,$*))/5) \
	    $(BUILD)/test/hip-$(firstword $(subst -, ,$*)) $(if $(findstring share,$*),--test-case-exclude=*large*) $(TESTARGS)

$(HIP_TESTS): $(BUILD)/test/hip-%: bnb-hip.cpp $(BUILD)/tests/main.o $(BUILD)/tests/test_backend.o $(LIBRARY_OBJECTS) \
    bnb-cuda.cu bnb.h $(wildcard tests/hip-on-cpu/hip/*.h)
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O3 $(WARNINGS) -Itests/hip-on-cpu $(HIP_ON_CPU_$*) $(filter %.cpp %.o,$^) -o $@ -lm -pthread

fuzz:
	+$(MAKE) fuzz-run BUILD=build/fuzz CC=$(CLANG) CXX=$(CLANG)++ CFLAGS="-O1 -g" CXXFLAGS="-O1 -g" \
	    EXTRA="-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -DBNB_FUZZ"

fuzz-run: $(FUZZERS:tests/fuzz/%.cpp=run-%)
run-fuzz_%: $(BUILD)/fuzz/fuzz_%
	@mkdir -p $(BUILD)/corpus/$*
	$< -max_total_time=$(FUZZ_SECONDS) -max_len=16384 -print_final_stats=1 $(BUILD)/corpus/$* $(wildcard tests/attacks/$*)

# Without the tests of resident memory: under qemu that is qemu's own. Nor shapes that are there for GPUs.
aarch64:
	+$(MAKE) test-library BUILD=build/aarch64 CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ \
	    AR=aarch64-linux-gnu-ar LDFLAGS=-static RUN=qemu-aarch64 \
	    TESTARGS="'--test-case-exclude=*8 GB*,*one tensor at a time*,*peak memory*,backend*large*' $(TESTARGS)"

# ---- install -------------------------------------------------------------------------------------------------------
# Installed or copied, sources include the same: "bnb.h", "models/model.h".

HEADERS = $(DESTDIR)$(PREFIX)/include/bnb
LIB = $(DESTDIR)$(PREFIX)/lib

define PKG_CONFIG
prefix=$${pcfiledir}/../..
Name: bnb
Description: runs language models in the bitsandbytes formats
Version: $(VERSION)
Cflags: -I$${prefix}/include/bnb
Libs: -L$${prefix}/lib -lbnb $(LIBS) -lstdc++ -lm -pthread
endef

define CMAKE_CONFIG
include(CMakeFindDependencyMacro)
find_dependency(Threads)
get_filename_component(bnb_PREFIX "$${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET bnb::bnb)
  add_library(bnb::bnb STATIC IMPORTED)
  set_target_properties(bnb::bnb PROPERTIES
    IMPORTED_LOCATION "$${bnb_PREFIX}/lib/libbnb.a"
    IMPORTED_LINK_INTERFACE_LANGUAGES "C;CXX"
    INTERFACE_INCLUDE_DIRECTORIES "$${bnb_PREFIX}/include/bnb"
    INTERFACE_LINK_LIBRARIES "$(subst $() ,;,$(strip Threads::Threads m $(LIBS)))")
endif()
endef

define CMAKE_VERSION
set(PACKAGE_VERSION "$(VERSION)")
if(PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION)
  set(PACKAGE_VERSION_COMPATIBLE FALSE)
else()
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
  if(PACKAGE_FIND_VERSION STREQUAL PACKAGE_VERSION)
    set(PACKAGE_VERSION_EXACT TRUE)
  endif()
endif()
endef
export PKG_CONFIG CMAKE_CONFIG CMAKE_VERSION

install: all $(BUILD)/libbnb.a
	install -d $(DESTDIR)$(PREFIX)/bin $(HEADERS)/models $(LIB)/pkgconfig $(LIB)/cmake/bnb
	for p in $(PROGRAMS); do install $(BIN)/$$p $(DESTDIR)$(PREFIX)/bin/bnb-$$p || exit 1; done
	install -m 644 bnb.h $(HEADERS)
	install -m 644 models/model.h models/checkpoint.h $(HEADERS)/models
	install -m 644 $(BUILD)/libbnb.a $(LIB)
	printf '%s\n' "$$PKG_CONFIG" > $(LIB)/pkgconfig/bnb.pc
	printf '%s\n' "$$CMAKE_CONFIG" > $(LIB)/cmake/bnb/bnbConfig.cmake
	printf '%s\n' "$$CMAKE_VERSION" > $(LIB)/cmake/bnb/bnbConfigVersion.cmake

clean:
	rm -rf build $(PROGRAMS)

help:
	@sed -n 's/^#   make/make/p' Makefile

.PHONY: all always demo test test-library asan tsan hip-on-cpu hip-on-cpu-run fuzz fuzz-run aarch64 install clean help
.SECONDARY:# keep objects that only pattern rules name
