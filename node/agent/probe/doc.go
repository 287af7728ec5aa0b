// Package probe runs the startup, liveness and readiness probes of running containers, with kubelet's rules for delays,
// periods and thresholds.
//
// A Prober owns one goroutine per probe of a container; Stop (or the end of the context) ends it, Wait waits for all. A changed
// result is visible in Results before the notify function is called. notify must not block and must not call the Prober.
package probe
