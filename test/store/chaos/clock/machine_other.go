//go:build !amd64

package clock

import "debug/elf"

const elfMachine = elf.EM_NONE
