// Asserting on errors: their exact type, and what their message must tell.
#pragma once

#include <gtest/gtest.h>

#include <exception>
#include <initializer_list>
#include <string>
#include <typeinfo>

namespace tidal::test {

// Success if `action` throws an Error (not a class derived from it) whose message holds all
// `parts`.
template <typename Error, typename Action>
::testing::AssertionResult Throws(const Action& action, std::initializer_list<std::string> parts) {
  try {
    action();
  } catch (const std::exception& error) {
    if (typeid(error) != typeid(Error)) {
      return ::testing::AssertionFailure()
             << "threw " << typeid(error).name() << ": " << error.what();
    }
    const std::string message = error.what();
    for (const std::string& part : parts) {
      if (message.find(part) == std::string::npos) {
        return ::testing::AssertionFailure() << "\"" << part << "\" is not in: " << message;
      }
    }
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << "threw nothing";
}

}  // namespace tidal::test
