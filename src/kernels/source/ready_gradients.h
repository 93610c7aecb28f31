// Notifications that a gradient is complete while the backward pass is still running.
#pragma once

#include "arguments.h"

namespace acnet {

// Tells whoever waits in acnet_ready_gradients that `output` of this call is complete.
void gradient_ready(const Arguments &arguments, int output, const void *data);

}  // namespace acnet
