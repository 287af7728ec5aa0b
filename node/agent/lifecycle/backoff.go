package lifecycle

import (
	"time"

	"skein.io/skein/node/desired"
)

// Back-off of restarts, as kubelet's: none before the first, then 10 s doubling up to 5 min, forgotten after the container
// ran for twice the maximum.
const (
	BackoffInitial = 10 * time.Second
	BackoffMax     = 5 * time.Minute
	backoffForget  = 2 * BackoffMax
)

// InBackoff returns until when a container that ended at finished is to wait, false when it may start.
func InBackoff(r desired.ContainerRecord, finished, now time.Time) (time.Time, bool) {
	if r.Backoff == 0 || finished.Sub(r.BackoffAt) > backoffForget {
		return time.Time{}, false
	}
	until := finished.Add(r.Backoff)
	return until, now.Before(until)
}

// NextBackoff is the record after a restart at now of a container that ended at finished.
func NextBackoff(r desired.ContainerRecord, finished, now time.Time) desired.ContainerRecord {
	if r.Backoff == 0 || finished.Sub(r.BackoffAt) > backoffForget {
		r.Backoff = BackoffInitial
	} else {
		r.Backoff = min(2*r.Backoff, BackoffMax)
	}
	r.BackoffAt = now
	return r
}
