// Package logs reads the log files that a CRI runtime writes: the one place that knows their format, which is upstream's
// reader. Reading follows rotation and ends when the container has ended or ctx does. The agent's server is its caller.
package logs

import (
	"context"
	"io"
	"time"

	corev1 "k8s.io/api/core/v1"
	internalapi "k8s.io/cri-api/pkg/apis"
	crilogs "k8s.io/cri-client/pkg/logs"
)

// Read writes the log at path of a container to the two streams (nil: not wanted), as opts ask at the time now.
func Read(ctx context.Context, path, containerID string, opts *corev1.PodLogOptions, now time.Time, rt internalapi.RuntimeService, stdout, stderr io.Writer) error {
	o := &crilogs.LogOptions{TailLines: opts.TailLines, LimitBytes: opts.LimitBytes, Follow: opts.Follow, Timestamp: opts.Timestamps}
	switch {
	case opts.SinceSeconds != nil:
		o.Since = now.Add(-time.Duration(*opts.SinceSeconds) * time.Second)
	case opts.SinceTime != nil:
		o.Since = opts.SinceTime.Time
	}
	return crilogs.ReadLogs(ctx, path, containerID, o, rt, stdout, stderr)
}
