//go:build ignore

// SPDX-License-Identifier: GPL-2.0
// All of Skein's kernel programs, one object, so that they share their maps.
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"
#include "pick.h"
#include "sock.h"
#include "nat.h"

char _license[] SEC("license") = "GPL";
