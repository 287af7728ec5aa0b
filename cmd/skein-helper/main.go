// Command skein-helper is the one small executable beside the daemon. containerd runs it: as the runc shim (API version
// 2) that stays with each pod, and as the CNI plugin that connects a pod to the network. It must not be the
// daemon itself, which is too large for a process per pod, and whose plugins clash with those of a shim.
//
// CNI is what its specification says: with CNI_COMMAND in the environment it is a plugin.
package main

import (
	"os"

	"skein.io/skein/datapath/podnet"
)

func main() {
	if os.Getenv("CNI_COMMAND") != "" {
		os.Exit(podnet.CNI())
	}
	runShim()
}
