package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"

	"skein.io/skein/test/cputime"
	"skein.io/skein/test/peers"
)

const (
	protobuf = "application/vnd.kubernetes.protobuf"
	clients  = 16 // requests at once
	// renewal is how often a node's Lease is renewed: within the 50 s after which it would be lost, on a busy machine as well.
	renewal = 34 * time.Second
	patient = 10 * time.Minute
)

// side is one of the two, with its nodes.
type side struct {
	*peers.Subject
	k     *kubernetes.Clientset
	nodes atomic.Int64 // made by hand
	// leases are those of the nodes, the longest not renewed first.
	leases chan renewed
	stop   func()
}

// renewed is when a node's Lease was.
type renewed struct {
	node int
	at   time.Time
}

// maxNodes bounds what is made.
const maxNodes = 1 << 16

func newSide(ctx context.Context, s *peers.Subject) (*side, error) {
	k, err := s.Client(protobuf)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	d := &side{Subject: s, k: k, leases: make(chan renewed, maxNodes)}
	var wg sync.WaitGroup
	if s.StartScheduler == nil { // nobody looks at Leases at the peer, which has that much less to do
		wg.Go(func() { d.renew(ctx) })
	}
	d.stop = func() { cancel(); wg.Wait(); s.Stop() }
	return d, nil
}

// each calls do for 0..n-1, some at once, and returns the first error.
func each(n int, do func(i int) error) error {
	var next atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for failed.Load() == nil {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := do(i); err != nil {
					failed.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	wg.Wait()
	if e := failed.Load(); e != nil {
		return *e
	}
	return nil
}

// prepare makes what all workloads need.
func (d *side) prepare(ctx context.Context) error {
	if err := d.Prepare(ctx, namespace); err != nil {
		return err
	}
	for _, c := range priorityClasses() {
		if _, err := d.k.SchedulingV1().PriorityClasses().Create(ctx, c, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	if d.StartScheduler != nil {
		return nil
	}
	// Nothing is to run on the real node.
	return d.await(ctx, "the real node is cordoned", func() (bool, error) {
		real, err := d.k.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil || len(real.Items) == 0 {
			return false, err
		}
		_, err = d.k.CoreV1().Nodes().Patch(ctx, real.Items[0].Name, types.MergePatchType, []byte(`{"spec":{"unschedulable":true}}`), metav1.PatchOptions{})
		return err == nil, err
	})
}

// grow makes nodes until there are n.
func (d *side) grow(ctx context.Context, n int) error {
	from := int(d.nodes.Load())
	err := each(n-from, func(i int) error {
		defer d.nodes.Add(1)
		o := node(from + i)
		_, err := d.k.CoreV1().Nodes().Create(ctx, o, metav1.CreateOptions{})
		switch {
		case err != nil:
		case d.StartScheduler == nil:
			err = d.lease(ctx, from+i, true)
		default:
			// Upstream taints new nodes until its controller manager, which is not here, has seen that they are ready.
			_, err = d.k.CoreV1().Nodes().Patch(ctx, o.Name, types.MergePatchType, []byte(`{"spec":{"taints":null}}`), metav1.PatchOptions{})
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: make nodes: %w", d.Name, err)
	}
	return d.await(ctx, "all nodes are ready", func() (bool, error) {
		list, err := d.k.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: everywhere, ResourceVersion: "0"})
		if err != nil {
			return false, err
		}
		for i := range list.Items {
			if len(list.Items[i].Spec.Taints) > 0 {
				return false, nil
			}
		}
		return len(list.Items) == n, nil
	})
}

func (d *side) lease(ctx context.Context, i int, first bool) error {
	now := metav1.NowMicro()
	defer func() { d.leases <- renewed{i, now.Time} }()
	name := nodeName(i)
	if first {
		_, err := d.k.CoordinationV1().Leases(corev1.NamespaceNodeLease).Create(ctx, &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: coordinationv1.LeaseSpec{HolderIdentity: &name, RenewTime: &now}}, metav1.CreateOptions{})
		return err
	}
	_, err := d.k.CoordinationV1().Leases(corev1.NamespaceNodeLease).Patch(ctx, name, types.MergePatchType,
		fmt.Appendf(nil, `{"spec":{"renewTime":%q}}`, now.Format(metav1.RFC3339Micro)), metav1.PatchOptions{})
	return err
}

// renew keeps the nodes alive, each in its own time, as their agents would: of 5,000 nodes one every 7 ms. A hundred at once would be a burst that
// pods wait for, and that no cluster has.
func (d *side) renew(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, clients)
	for {
		var r renewed
		select {
		case <-ctx.Done():
			return
		case r = <-d.leases:
		}
		if pause(ctx, time.Until(r.at.Add(renewal))) != nil {
			return
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := d.lease(ctx, r.node, false); err != nil && ctx.Err() == nil {
				say("%s: renew a lease: %v", d.Name, err)
			}
		})
	}
}

// await asks until the answer is yes.
func (d *side) await(ctx context.Context, what string, ask func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, patient)
	defer cancel()
	for {
		began := time.Now()
		ok, err := ask()
		if err != nil {
			return fmt.Errorf("%s: %s: %w", d.Name, what, err)
		}
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %s: not within %s", d.Name, what, patient)
		case <-time.After(max(200*time.Millisecond, 4*time.Since(began))): // a list of thousands is work for them
		}
	}
}

// create makes pods and returns how long it took.
func (d *side) create(ctx context.Context, n int, make func(i int) *corev1.Pod) (time.Duration, error) {
	began := time.Now()
	err := each(n, func(i int) error {
		_, err := d.k.CoreV1().Pods(namespace).Create(ctx, make(i), metav1.CreateOptions{})
		return err
	})
	if err != nil {
		err = fmt.Errorf("%s: create pods: %w", d.Name, err)
	}
	return time.Since(began), err
}

// events is how many there are.
func (d *side) events(ctx context.Context) (int64, error) {
	list, err := d.k.CoreV1().Events(namespace).List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return 0, fmt.Errorf("%s: count events: %w", d.Name, err)
	}
	n := int64(len(list.Items))
	if list.RemainingItemCount != nil {
		n += *list.RemainingItemCount
	}
	return n, nil
}

// told waits until no event has been written for a second and a half, and gives how many there are, and what CPU the side had used when the last was there. Both
// sides write events when pods are bound already.
func (d *side) told(ctx context.Context) (events int64, used time.Duration, err error) {
	var since time.Time
	err = d.await(ctx, "events are written", func() (bool, error) {
		n, err := d.events(ctx)
		if err != nil {
			return false, err
		}
		if now := time.Now(); since.IsZero() || n != events {
			if used, err = cputime.Of(d.Pids()); err != nil {
				return false, err
			}
			events, since = n, now
		}
		return time.Since(since) > 1500*time.Millisecond, nil
	})
	return events, used, err
}

// clear deletes all pods and waits until they are gone.
func (d *side) clear(ctx context.Context) error {
	none := int64(0)
	return d.await(ctx, "pods are gone", func() (bool, error) {
		list, err := d.k.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
		if err != nil || len(list.Items) == 0 {
			return err == nil, err
		}
		return false, each(len(list.Items), func(i int) error {
			err := d.k.CoreV1().Pods(namespace).Delete(ctx, list.Items[i].Name, metav1.DeleteOptions{GracePeriodSeconds: &none})
			if apierrors.IsNotFound(err) {
				return nil
			}
			return err
		})
	})
}

// bindings counts the pods that a watch shows bound, without decoding them.
type bindings struct {
	k    *kubernetes.Clientset
	opts metav1.ListOptions // which pods
	n    atomic.Int64
	last atomic.Pointer[time.Time]
	err  atomic.Pointer[error]
	stop func()
}

// rewatches is how often a watch may end in one measure. A server ends one after half an hour, or if the reader is slow, which upstream says of one a second under churn.
const rewatches = 20

// watch counts the pods that match and become bound from now on.
func (d *side) watch(ctx context.Context, labels string) (*bindings, error) {
	// Their own connection: creates must not wait behind events.
	k, err := d.Client(protobuf)
	if err != nil {
		return nil, err
	}
	b := &bindings{k: k, opts: metav1.ListOptions{FieldSelector: "spec.nodeName!=", LabelSelector: labels}}
	ctx, cancel := context.WithCancel(ctx)
	body, err := b.begin(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for ends := 0; ; ends++ {
			err := b.count(body)
			body.Close()
			if ctx.Err() != nil {
				return
			}
			if ends < rewatches {
				say("%s: the watch of bound pods ended: %v; watching again", d.Name, err)
				if body, err = b.begin(ctx); err == nil {
					continue
				}
			}
			b.err.Store(&err)
			return
		}
	})
	b.stop = func() { cancel(); wg.Wait() }
	return b, nil
}

// begin counts what is bound and watches from there.
func (b *bindings) begin(ctx context.Context) (io.ReadCloser, error) {
	list, err := b.k.CoreV1().Pods(namespace).List(ctx, b.opts)
	if err != nil {
		return nil, fmt.Errorf("list bound pods: %w", err)
	}
	b.bound(int64(len(list.Items)) - b.n.Load())
	opts := b.opts
	opts.ResourceVersion, opts.Watch = list.ResourceVersion, true
	body, err := b.k.CoreV1().RESTClient().Get().Namespace(namespace).Resource("pods").VersionedParams(&opts, scheme.ParameterCodec).Stream(ctx)
	if err != nil {
		return nil, fmt.Errorf("watch bound pods: %w", err)
	}
	return body, nil
}

// bound counts more pods.
func (b *bindings) bound(more int64) {
	if more <= 0 {
		return
	}
	now := time.Now()
	b.last.Store(&now)
	b.n.Add(more)
}

func (b *bindings) count(body io.Reader) error {
	return peers.Frames(body, 64<<10, func(event []byte) error {
		var ev metav1.WatchEvent
		if err := ev.Unmarshal(event); err != nil {
			return err
		}
		switch ev.Type {
		case "ADDED": // it has begun to match: it was bound
			b.bound(1)
		case "ERROR":
			return fmt.Errorf("the server says %q", ev.Object.Raw)
		}
		return nil
	})
}

// await waits until n pods are bound.
func (b *bindings) await(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, patient)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for b.n.Load() < int64(n) {
		if e := b.err.Load(); e != nil {
			return fmt.Errorf("the watch of bound pods ended: %w", *e)
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), fmt.Errorf("%d of %d pods were bound", b.n.Load(), n))
		case <-tick.C:
		}
	}
	return nil
}
