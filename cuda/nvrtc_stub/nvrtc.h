// In place of the toolkit's nvrtc.h where that is not installed: the names that cuDNN's frontend
// mentions in parts of it that nothing here calls. It looks the functions up at run time.
#pragma once

typedef enum { NVRTC_SUCCESS = 0, NVRTC_ERROR_INTERNAL_ERROR = 11 } nvrtcResult;
typedef struct _nvrtcProgram* nvrtcProgram;
