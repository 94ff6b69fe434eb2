/* Operators of ONNX Runtime in which several ranks combine their tensors.
 *
 * Domain mpt_trt, for float32, float16 and bfloat16:
 *   AllReduce  the sum of all ranks' inputs, which have the same shape
 *   AllGather  the inputs of all ranks one after another, along the first axis
 *
 * Their attribute "group" is the address of a Group, which says how. On a GPU, its functions are
 * NCCL's, which put the work on the stream of the session, also while that is captured. The same
 * operators run on a CPU, where the stream is NULL.
 *
 * ONNX Runtime's and NCCL's packages have no headers, so the used parts of their binary interfaces
 * are declared here. Both interfaces only grow at their ends.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

/* ---- The group ---- */

enum { NCCL_SUM = 0, NCCL_FLOAT16 = 6, NCCL_FLOAT32 = 7, NCCL_BFLOAT16 = 9 };

/* Filled by CollectiveGroup in collectives.py. Functions have NCCL's signatures and return 0 or an
 * error. */
typedef struct {
  void *communicator; /* NULL until the ranks are connected */
  int64_t size;       /* number of ranks */
  int (*all_reduce)(const void *, void *, size_t, int type, int op, void *comm, void *stream);
  int (*all_gather)(const void *, void *, size_t, int type, void *comm, void *stream);
  const char *(*error_string)(int);
} Group;

/* ---- ONNX Runtime ---- */

/* The first version whose operators may work in place (ONNX Runtime 1.18). */
enum { API_VERSION = 18 };

typedef void Status;       /* NULL: success */
typedef void *const *Api;  /* a table of functions */

typedef struct {
  Api (*get_api)(uint32_t version);
  const char *(*get_version)(void);
} ApiBase;

/* Indices in the table. */
enum {
  CREATE_STATUS = 0,
  CREATE_CUSTOM_OP_DOMAIN = 26,
  CUSTOM_OP_DOMAIN_ADD = 27,
  ADD_CUSTOM_OP_DOMAIN = 28,
  GET_TENSOR_MUTABLE_DATA = 51,
  GET_TENSOR_ELEMENT_TYPE = 60,
  GET_DIMENSIONS_COUNT = 61,
  GET_DIMENSIONS = 62,
  GET_SYMBOLIC_DIMENSIONS = 63,
  GET_TENSOR_SHAPE_ELEMENT_COUNT = 64,
  GET_TENSOR_TYPE_AND_SHAPE = 65,
  KERNEL_INFO_GET_ATTRIBUTE_INT64 = 86,
  KERNEL_CONTEXT_GET_INPUT = 90,
  KERNEL_CONTEXT_GET_OUTPUT = 91,
  RELEASE_STATUS = 93,
  RELEASE_TENSOR_TYPE_AND_SHAPE_INFO = 99,
  KERNEL_CONTEXT_GET_GPU_COMPUTE_STREAM = 193,
  SHAPE_INFER_CONTEXT_GET_INPUT_TYPE_SHAPE = 268,
  SHAPE_INFER_CONTEXT_SET_OUTPUT_TYPE_SHAPE = 270,
};
#define CALL(api, index, types, ...) ((Status * (*) types)(api)[index])(__VA_ARGS__)
#define TRY(call)         \
  do {                    \
    status = (call);      \
    if (status) goto end; \
  } while (0)

enum { FAIL = 1 };                                /* code of a status */
enum { FLOAT = 1, FLOAT16 = 10, BFLOAT16 = 16 };  /* ONNX types */
enum { REQUIRED = 0 };                            /* characteristic of inputs and outputs */
enum { DEFAULT_MEMORY = 0 };                      /* that of the provider */

/* OrtCustomOp, followed by this library's own data. */
typedef struct Op Op;
struct Op {
  uint32_t version;
  void *(*create_kernel)(const Op *, Api, const void *info);
  const char *(*get_name)(const Op *);
  const char *(*get_provider)(const Op *);
  int (*get_input_type)(const Op *, size_t);
  size_t (*get_input_count)(const Op *);
  int (*get_output_type)(const Op *, size_t);
  size_t (*get_output_count)(const Op *);
  void (*compute)(void *kernel, void *context);
  void (*destroy_kernel)(void *kernel);
  int (*get_input_characteristic)(const Op *, size_t);
  int (*get_output_characteristic)(const Op *, size_t);
  int (*get_input_memory)(const Op *, size_t);
  int (*get_variadic_input_min_arity)(const Op *);
  int (*get_variadic_input_homogeneity)(const Op *);
  int (*get_variadic_output_min_arity)(const Op *);
  int (*get_variadic_output_homogeneity)(const Op *);
  Status *(*create_kernel_v2)(const Op *, Api, const void *info, void **kernel);
  Status *(*compute_v2)(void *kernel, void *context);
  Status *(*infer_output_shape)(const Op *, void *context);
  int (*get_start_version)(const Op *);
  int (*get_end_version)(const Op *);
  size_t (*get_may_inplace)(int **inputs, int **outputs);
  void (*release_may_inplace)(int *inputs, int *outputs);
  size_t (*get_alias_map)(int **inputs, int **outputs);
  void (*release_alias_map)(int *inputs, int *outputs);

  int gathers;
  int type;
  const char *provider;
};

static void release_status(Api api, Status *status) {
  if (status) ((void (*)(Status *))api[RELEASE_STATUS])(status);
}

static void release_info(Api api, void *info) {
  if (info) ((void (*)(void *))api[RELEASE_TENSOR_TYPE_AND_SHAPE_INFO])(info);
}

/* ---- Kernels ---- */

enum { MAX_DIMENSIONS = 16 };

typedef struct {
  Api api;
  int gathers;
  const Group *group;
} Kernel;

static const char *name_of(int gathers) { return gathers ? "AllGather" : "AllReduce"; }

static Status *fail(Api api, int gathers, const char *what) {
  char message[400];
  snprintf(message, sizeof message, "%s: %s", name_of(gathers), what);
  return CALL(api, CREATE_STATUS, (int, const char *), FAIL, message);
}

static Status *create_kernel(const Op *op, Api api, const void *info, void **out) {
  int64_t group = 0;
  Status *status = CALL(api, KERNEL_INFO_GET_ATTRIBUTE_INT64,
                        (const void *, const char *, int64_t *), info, "group", &group);
  if (status) return status;
  Kernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return fail(api, op->gathers, "out of memory");
  *kernel = (Kernel){api, op->gathers, (const Group *)(intptr_t)group};
  *out = kernel;
  return NULL;
}

static Status *combine(const Kernel *kernel, const void *from, void *to, size_t count, int type,
                       void *stream) {
  const Group *group = kernel->group;
  int nccl_type = type == FLOAT ? NCCL_FLOAT32 : type == FLOAT16 ? NCCL_FLOAT16 : NCCL_BFLOAT16;
  void *comm = group->communicator;
  if (!comm) return fail(kernel->api, kernel->gathers, "the ranks are not connected");
  int error = kernel->gathers
                  ? group->all_gather(from, to, count, nccl_type, comm, stream)
                  : group->all_reduce(from, to, count, nccl_type, NCCL_SUM, comm, stream);
  return error ? fail(kernel->api, kernel->gathers, group->error_string(error)) : NULL;
}

static Status *compute(void *opaque, void *context) {
  const Kernel *kernel = opaque;
  Api api = kernel->api;
  void *input = NULL, *output = NULL, *info = NULL, *from = NULL, *to = NULL, *stream = NULL;
  int type = 0;
  size_t dimensions = 0, count = 0;
  int64_t shape[MAX_DIMENSIONS];
  Status *status;

  TRY(CALL(api, KERNEL_CONTEXT_GET_INPUT, (void *, size_t, void **), context, 0, &input));
  TRY(CALL(api, GET_TENSOR_TYPE_AND_SHAPE, (void *, void **), input, &info));
  TRY(CALL(api, GET_TENSOR_ELEMENT_TYPE, (void *, int *), info, &type));
  TRY(CALL(api, GET_DIMENSIONS_COUNT, (void *, size_t *), info, &dimensions));
  if (dimensions > MAX_DIMENSIONS || (kernel->gathers && !dimensions)) {
    status = fail(api, kernel->gathers, "unsupported number of dimensions");
    goto end;
  }
  TRY(CALL(api, GET_DIMENSIONS, (void *, int64_t *, size_t), info, shape, dimensions));
  TRY(CALL(api, GET_TENSOR_SHAPE_ELEMENT_COUNT, (void *, size_t *), info, &count));
  if (kernel->gathers) shape[0] *= kernel->group->size;
  TRY(CALL(api, KERNEL_CONTEXT_GET_OUTPUT, (void *, size_t, const int64_t *, size_t, void **),
           context, 0, shape, dimensions, &output));
  if (!count) goto end; /* on every rank, because all have the same shape */
  TRY(CALL(api, GET_TENSOR_MUTABLE_DATA, (void *, void **), input, &from));
  TRY(CALL(api, GET_TENSOR_MUTABLE_DATA, (void *, void **), output, &to));
  TRY(CALL(api, KERNEL_CONTEXT_GET_GPU_COMPUTE_STREAM, (void *, void **), context, &stream));
  status = combine(kernel, from, to, count, type, stream);
end:
  release_info(api, info);
  return status;
}

/* ---- Descriptions of the operators ---- */

static Api inference_api; /* infer_shape has no parameter for it */

/* Gives the output the input's shape, by which other operators are fused and planned. */
static Status *infer_shape(const Op *op, void *context) {
  (void)op;
  Api api = inference_api;
  void *info = NULL; /* the context's own */
  size_t dimensions = 0;
  int64_t shape[MAX_DIMENSIONS];
  const char *names[MAX_DIMENSIONS] = {0};
  int is_known = 1;
  Status *status;
  TRY(CALL(api, SHAPE_INFER_CONTEXT_GET_INPUT_TYPE_SHAPE, (void *, size_t, void **), context, 0,
           &info));
  TRY(CALL(api, GET_DIMENSIONS_COUNT, (void *, size_t *), info, &dimensions));
  /* An unknown shape also has no dimensions. */
  if (!dimensions || dimensions > MAX_DIMENSIONS) goto end;
  TRY(CALL(api, GET_DIMENSIONS, (void *, int64_t *, size_t), info, shape, dimensions));
  TRY(CALL(api, GET_SYMBOLIC_DIMENSIONS, (void *, const char **, size_t), info, names,
           dimensions));
  for (size_t i = 0; i < dimensions; i++) is_known &= shape[i] >= 0 || (names[i] && *names[i]);
  if (is_known)
    TRY(CALL(api, SHAPE_INFER_CONTEXT_SET_OUTPUT_TYPE_SHAPE, (void *, size_t, void *), context, 0,
             info));
end:
  release_status(api, status); /* ONNX Runtime would neither report nor release it */
  return NULL;
}

static const char *get_name(const Op *op) { return name_of(op->gathers); }
static const char *get_provider(const Op *op) { return op->provider; }
static int get_type(const Op *op, size_t i) { return (void)i, op->type; }
static size_t get_count(const Op *op) { return (void)op, 1; }
static int get_characteristic(const Op *op, size_t i) { return (void)op, (void)i, REQUIRED; }
static int get_memory(const Op *op, size_t i) { return (void)op, (void)i, DEFAULT_MEMORY; }
static int get_one(const Op *op) { return (void)op, 1; }

static size_t get_may_inplace(int **inputs, int **outputs) {
  static int first[] = {0};
  *inputs = *outputs = first;
  return 1;
}
static void release_may_inplace(int *inputs, int *outputs) { (void)inputs, (void)outputs; }

static Op describe(int gathers, int type, const char *provider) {
  return (Op){
      .version = API_VERSION,
      .get_name = get_name,
      .get_provider = get_provider,
      .get_input_type = get_type,
      .get_input_count = get_count,
      .get_output_type = get_type,
      .get_output_count = get_count,
      .destroy_kernel = free,
      .get_input_characteristic = get_characteristic,
      .get_output_characteristic = get_characteristic,
      .get_input_memory = get_memory,
      .get_variadic_input_min_arity = get_one,
      .get_variadic_input_homogeneity = get_one,
      .get_variadic_output_min_arity = get_one,
      .get_variadic_output_homogeneity = get_one,
      .create_kernel_v2 = create_kernel,
      .compute_v2 = compute,
      .infer_output_shape = gathers ? NULL : infer_shape,
      .get_start_version = get_one,
      .get_may_inplace = gathers ? NULL : get_may_inplace,
      .release_may_inplace = gathers ? NULL : release_may_inplace,
      .gathers = gathers,
      .type = type,
      .provider = provider,
  };
}

/* Called by ONNX Runtime for every session. The domain lives as long as the process. */
EXPORT Status *RegisterCustomOps(void *options, const ApiBase *base) {
  static const int types[] = {FLOAT, FLOAT16, BFLOAT16};
  static const char *const providers[] = {"CPUExecutionProvider", "CUDAExecutionProvider"};
  static Op ops[12];
  static void *domain;

  Api api = base->get_api(API_VERSION);
  if (!api) { /* version 1 suffices to say so */
    api = base->get_api(1);
    return api ? fail(api, 0, "ONNX Runtime 1.18 or later is needed") : NULL;
  }
  inference_api = api;
  if (!domain) {
    void *made = NULL;
    Status *status =
        CALL(api, CREATE_CUSTOM_OP_DOMAIN, (const char *, void **), "mpt_trt", &made);
    for (int i = 0; i < 12 && !status; i++) {
      ops[i] = describe(i / 6, types[i % 3], providers[i / 3 % 2]);
      status = CALL(api, CUSTOM_OP_DOMAIN_ADD, (void *, const Op *), made, &ops[i]);
    }
    if (status) return status;
    domain = made;
  }
  return CALL(api, ADD_CUSTOM_OP_DOMAIN, (void *, void *), options, domain);
}
