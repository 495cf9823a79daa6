# Flags of our own targets: an INTERFACE target, so that nothing leaks into what we link.
# No fast-math anywhere: NaN and -inf have a meaning in this engine. A warning is an error where the
# tests are built; who installs may have a compiler with others.
add_library(tidal_flags INTERFACE)
target_compile_options(tidal_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow $<$<BOOL:${TIDAL_TESTS}>:-Werror>>)
if(TIDAL_SANITIZE)
  target_compile_options(tidal_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${TIDAL_SANITIZE} -fno-omit-frame-pointer
      -fno-sanitize-recover=all>)
  target_link_options(tidal_flags INTERFACE -fsanitize=${TIDAL_SANITIZE})
endif()
