package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"skein.io/skein/test/cputime"
)

const (
	// warmUp is how long a cell runs before it is measured.
	warmUp = 200 * time.Millisecond
	// requestTimeout bounds one request.
	requestTimeout = 15 * time.Second
	// listed keys are in a list, as the issue of this benchmark demands.
	listed = 1000
)

// result of one cell.
type result struct {
	ops      float64 // a second
	p50, p99 time.Duration
	cpu      time.Duration // of the servers, an operation
	flushes  float64       // of the disk, an operation; negative if unknown
	errs     int64
}

// bench is what all cells share.
type bench struct {
	value    []byte
	duration time.Duration
	disk     disk
	profiles profiles
}

// op is one operation of worker w on a set; n counts the worker's operations.
type op func(ctx context.Context, k keyset, kv pb.KVClient, s *worker) error

// worker is one closed loop.
type worker struct {
	id, n int
	rng   *rand.Rand
	revs  map[string]int64 // what compare-and-swap expects
	lat   []time.Duration
}

func (b *bench) ops() map[string]op {
	read := func(serializable bool) op {
		return func(ctx context.Context, k keyset, kv pb.KVClient, s *worker) error {
			r, err := kv.Range(ctx, &pb.RangeRequest{Key: listKey(k, s.rng.IntN(listed)), Serializable: serializable})
			if err == nil && len(r.Kvs) != 1 {
				err = fmt.Errorf("%d keys found", len(r.Kvs))
			}
			return err
		}
	}
	return map[string]op{
		"put":    b.put,
		"cas":    b.cas,
		"lrange": read(false),
		"srange": read(true),
		"list": func(ctx context.Context, k keyset, kv pb.KVClient, _ *worker) error {
			r, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(k.prefix + "list/"), RangeEnd: []byte(k.prefix + "list0")})
			if err == nil && len(r.Kvs) != listed {
				err = fmt.Errorf("%d keys listed", len(r.Kvs))
			}
			return err
		},
	}
}

func listKey(k keyset, i int) []byte { return fmt.Appendf(nil, "%slist/%06d", k.prefix, i) }

func (b *bench) put(ctx context.Context, k keyset, kv pb.KVClient, s *worker) error {
	_, err := kv.Put(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "%sput/%d/%d", k.prefix, s.id, s.n%100), Value: b.value})
	return err
}

// cas replaces a key that nobody else writes, as a controller does with its object.
func (b *bench) cas(ctx context.Context, k keyset, kv pb.KVClient, s *worker) error {
	key := fmt.Sprintf("%scas/%d/%d", k.prefix, s.id, s.n%20)
	r, err := kv.Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{{Target: pb.Compare_MOD, Key: []byte(key), TargetUnion: &pb.Compare_ModRevision{ModRevision: s.revs[key]}}},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: b.value}}}},
		Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}},
	})
	if err != nil {
		return err
	}
	if !r.Succeeded { // left by an earlier cell
		if kvs := r.Responses[0].GetResponseRange().Kvs; len(kvs) == 1 {
			s.revs[key] = kvs[0].ModRevision
			return nil
		}
		return errors.New("compared and swapped in vain")
	}
	s.revs[key] = r.Header.Revision
	return nil
}

// closed runs n workers that each have one request under way.
func (b *bench) closed(ctx context.Context, t *target, name string, do op, n int) (result, error) {
	warm := time.Now().Add(warmUp)
	end := warm.Add(b.duration)
	ctx, cancel := context.WithDeadline(ctx, end.Add(requestTimeout))
	defer cancel()
	var errs atomic.Int64
	var first atomic.Pointer[error]
	workers := make([]*worker, n)
	var wg sync.WaitGroup
	for i := range workers {
		s := &worker{id: i, rng: rand.New(rand.NewPCG(uint64(i), 1)), revs: t.expected(i)}
		workers[i] = s
		wg.Go(func() {
			k := t.sets[i%len(t.sets)]
			clients := make([]pb.KVClient, len(k.conns))
			for j := range clients {
				clients[j] = pb.NewKVClient(k.conn(j))
			}
			for ; ; s.n++ {
				start := time.Now()
				if start.After(end) || ctx.Err() != nil {
					return
				}
				kv := clients[(i/len(t.sets)+s.n)%len(clients)]
				if err := do(ctx, k, kv, s); err != nil {
					errs.Add(1)
					first.CompareAndSwap(nil, &err)
				} else if start.After(warm) {
					s.lat = append(s.lat, time.Since(start))
				}
			}
		})
	}
	usage, stop := b.usage(t, warm)
	defer stop()
	profiled := b.profiles.during(ctx, t.cluster, fmt.Sprintf("%s-%d-%s", name, n, t.name), warm, b.duration)
	wg.Wait()
	var lat []time.Duration
	for _, s := range workers {
		lat = append(lat, s.lat...)
	}
	r := summarise(lat, time.Since(warm))
	r.errs = errs.Load()
	if err := usage(&r, len(lat)); err != nil {
		return r, err
	}
	if err := profiled(); err != nil {
		return r, err
	}
	if e := first.Load(); e != nil && len(lat) == 0 {
		return r, fmt.Errorf("every request to %s failed: %w", t.name, *e)
	}
	return r, ctx.Err()
}

func summarise(lat []time.Duration, d time.Duration) (r result) {
	slices.Sort(lat)
	r.ops = float64(len(lat)) / d.Seconds()
	if len(lat) > 0 {
		r.p50, r.p99 = lat[len(lat)/2], lat[len(lat)*99/100]
	}
	return r
}

// usage begins to count CPU and flushes at a time; the function that it returns
// adds what n operations needed of them to a result.
func (b *bench) usage(t *target, from time.Time) (func(r *result, n int) error, func() bool) {
	type mark struct {
		cpu     time.Duration
		flushes uint64
		known   bool
		err     error
	}
	look := func() (m mark) {
		m.cpu, m.err = cputime.Of(t.cluster.pids())
		m.flushes, m.known = b.disk.flushes()
		return m
	}
	begin := make(chan mark, 1)
	timer := time.AfterFunc(time.Until(from), func() { begin <- look() })
	return func(r *result, n int) error {
		m, now := <-begin, look()
		if err := errors.Join(m.err, now.err); err != nil || n == 0 {
			return err
		}
		r.cpu = (now.cpu - m.cpu) / time.Duration(n)
		r.flushes = -1
		if m.known && now.known {
			r.flushes = float64(now.flushes-m.flushes) / float64(n)
		}
		return nil
	}, timer.Stop
}

// parallel runs f for 0..n-1 with so many workers.
func parallel(n, workers int, f func(i int) error) error {
	var next atomic.Int64
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for errs[w] == nil {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				errs[w] = f(i)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// fill writes n values over so many keys of each set.
func (b *bench) fill(ctx context.Context, t *target, n int, key func(k keyset, i int) []byte) error {
	return parallel(n, 16, func(i int) error {
		ctx, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		k := t.sets[i%len(t.sets)]
		if _, err := pb.NewKVClient(k.conn(i/len(t.sets))).Put(ctx, &pb.PutRequest{Key: key(k, i/len(t.sets)), Value: b.value}); err != nil {
			return fmt.Errorf("fill %s: %w", t.name, err)
		}
		return nil
	})
}

// compact forgets the history, as an API server does now and then, so that later
// cells meet as much data as earlier ones. It waits for the end, which comes a moment
// later: else the work would be part of whichever cell is next.
func (b *bench) compact(ctx context.Context, t *target) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	for _, k := range t.sets {
		kv := pb.NewKVClient(k.conn(0))
		r, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(k.prefix)})
		if err == nil {
			_, err = kv.Compact(ctx, &pb.CompactionRequest{Revision: r.Header.Revision, Physical: true})
		}
		if err != nil && !isCompacted(err) { // sets of one shard share a history
			return fmt.Errorf("compact %s: %w", t.name, err)
		}
	}
	return nil
}
