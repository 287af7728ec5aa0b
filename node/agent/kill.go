package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"skein.io/skein/node/agent/lifecycle"
	"skein.io/skein/node/agent/probe"
)

// minGrace is the least time, in seconds, that a container gets after its signal, as by kubelet.
const minGrace = 2

// kill stops the groups one after the other, the containers of a group at once. All share the grace period, which counts
// from the first attempt.
func (w *worker) kill(ctx context.Context, pod *corev1.Pod, action lifecycle.Action) error {
	for _, group := range action.Groups {
		errs := make([]error, len(group))
		var wg sync.WaitGroup
		for _, v := range group {
			if _, ok := w.killSince[v.ID]; !ok {
				w.killSince[v.ID] = time.Now()
				if v.Again {
					w.again[v.ID] = true
				}
				w.eventf(pod, v.Name, corev1.EventTypeNormal, "Killing", "%s", v.Reason)
			}
		}
		since := w.killSince[action.Groups[0][0].ID]
		grace := action.Grace - int64(time.Since(since).Seconds())
		for i, v := range group {
			spec := containerSpec(pod, v.Name)
			runHook := spec != nil && spec.Lifecycle != nil && spec.Lifecycle.PreStop != nil && !w.hooked[v.ID] && grace > 0
			if runHook {
				w.hooked[v.ID] = true
			} else if spec != nil {
				c := *spec
				c.Lifecycle = nil
				spec = &c
			}
			wg.Go(func() { errs[i] = w.stopContainer(ctx, pod, spec, v, grace) })
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
	}
	return nil
}

// stopContainer runs the preStop hook, if spec has one, and stops the container within what remains of the grace period.
func (w *worker) stopContainer(ctx context.Context, pod *corev1.Pod, spec *corev1.Container, v lifecycle.Victim, grace int64) error {
	if spec != nil && spec.Lifecycle != nil && spec.Lifecycle.PreStop != nil {
		began := time.Now()
		hctx, cancel := context.WithTimeout(ctx, time.Duration(grace)*time.Second)
		err := w.runHook(hctx, pod, spec, v.ID, spec.Lifecycle.PreStop)
		cancel()
		if err != nil && hctx.Err() == nil {
			w.eventf(pod, v.Name, corev1.EventTypeWarning, "FailedPreStopHook", "PreStopHook failed")
		}
		grace -= int64(time.Since(began).Seconds())
	}
	err := w.a.cfg.Runtime.StopContainer(ctx, v.ID, max(grace, minGrace))
	if err != nil && !isNotFound(err) {
		return fmt.Errorf("stop container %s: %w", v.Name, err)
	}
	return nil
}

// runHook runs a lifecycle hook. Its output goes into the error, not into events: it may hold secrets.
func (w *worker) runHook(ctx context.Context, pod *corev1.Pod, spec *corev1.Container, id string, h *corev1.LifecycleHandler) error {
	desc := func(kind string, err error) error {
		return fmt.Errorf("%s lifecycle hook for Container %q in Pod %q failed - error: %w", kind, spec.Name, lifecycle.PodDesc(pod), err)
	}
	switch {
	case h.Exec != nil:
		stdout, stderr, err := w.a.cfg.Runtime.ExecSync(ctx, id, h.Exec.Command, 0)
		if err != nil {
			return desc(fmt.Sprintf("Exec (%v)", h.Exec.Command), fmt.Errorf("%w, message: %q", err, string(append(stdout, stderr...))))
		}
	case h.HTTPGet != nil:
		if err := w.httpHook(ctx, pod, spec, h.HTTPGet); err != nil {
			return desc("HTTP ("+h.HTTPGet.Path+")", err)
		}
	case h.Sleep != nil:
		select {
		case <-ctx.Done():
			return desc("Sleep", ctx.Err())
		case <-time.After(time.Duration(h.Sleep.Seconds) * time.Second):
		}
	case h.TCPSocket != nil: // accepted by the API for old objects, never run
	}
	return nil
}

// hookClient talks to pods: their certificates name nothing that could be checked.
var hookClient = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} //nolint:gosec // see above

// httpHook sends a hook's request. As with kubelet any answer counts as success, and an HTTPS hook that meets plain HTTP is
// sent again without TLS.
func (w *worker) httpHook(ctx context.Context, pod *corev1.Pod, spec *corev1.Container, a *corev1.HTTPGetAction) error {
	req, err := probe.Request(ctx, a, spec, w.podIP(pod), "lifecycle")
	if err != nil {
		return err
	}
	resp, err := hookClient.Do(req)
	if err != nil && strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") {
		again := req.Clone(ctx)
		again.URL.Scheme = "http"
		again.Header.Del("Authorization")
		resp, err = hookClient.Do(again)
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 10<<10))
	return nil
}
