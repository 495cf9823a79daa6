// The Python module tidaldecode._core: the C++ API (include/tidal), converted, and nothing else.
#include "bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ engine behind tidaldecode; use the tidaldecode package, not this module.";
  tidal::RegisterErrors();
  tidal::RegisterConfig(module);
  tidal::RegisterGeneration(module);
  tidal::RegisterGuideDesk(module);
  tidal::RegisterSession(module);
  tidal::RegisterReplay(module);
  tidal::RegisterDecoder(module);
  tidal::RegisterExit();
}
