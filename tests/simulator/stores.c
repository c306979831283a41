/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "sim.h"

bool has_store_hooks;
