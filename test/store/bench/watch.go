package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	watches = 100
	// sampled: one in so many watches measures latencies.
	sampled = 10
	// drain bounds the wait for events after the last write.
	drain = 5 * time.Second
)

func isCompacted(err error) bool { return rpctypes.Error(err) == rpctypes.ErrCompacted }

// watchers are open watches, one stream each.
type watchers struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	events atomic.Int64
	gone   atomic.Int64 // streams that ended early

	mu  sync.Mutex // guards lat
	lat []time.Duration
}

// openWatches opens the watches, spread over the prefixes, and waits until they are there.
func openWatches(ctx context.Context, name string, sets []keyset) (*watchers, error) {
	ctx, cancel := context.WithCancel(ctx)
	w := &watchers{cancel: cancel}
	for i := range watches {
		k := sets[i%len(sets)]
		stream, err := k.conn(i/len(sets)).NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/etcdserverpb.Watch/Watch")
		if err != nil {
			w.close()
			return nil, fmt.Errorf("watch %s: %w", name, err)
		}
		err = stream.SendMsg(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
			Key: []byte(k.prefix + "watch/"), RangeEnd: []byte(k.prefix + "watch0")}}})
		created := &pb.WatchResponse{}
		if err == nil {
			err = stream.RecvMsg(created)
		}
		if err == nil && (!created.Created || created.Canceled) {
			err = errors.New(created.CancelReason)
		}
		if err != nil {
			w.close()
			return nil, fmt.Errorf("watch %s: %w", name, err)
		}
		w.wg.Go(func() { w.receive(ctx, stream, i%sampled == 0) })
	}
	return w, nil
}

func (w *watchers) close() {
	w.cancel()
	w.wg.Wait()
}

func (w *watchers) receive(ctx context.Context, stream grpc.ClientStream, measure bool) {
	for {
		var r raw
		if err := stream.RecvMsg(&r); err != nil {
			if ctx.Err() == nil {
				w.gone.Add(1)
			}
			return
		}
		now := time.Now()
		var lat []time.Duration
		n := 0
		eachEvent(r.b, func(value []byte) {
			n++
			if measure && len(value) >= 8 {
				lat = append(lat, now.Sub(time.Unix(0, int64(binary.BigEndian.Uint64(value)))))
			}
		})
		w.events.Add(int64(n))
		if len(lat) > 0 {
			w.mu.Lock()
			w.lat = append(w.lat, lat...)
			w.mu.Unlock()
		}
	}
}

// The fields on the way from a WatchResponse to the value of an event's key.
const (
	responseEvents = 11
	eventKV        = 2
	kvValue        = 5
)

// eachEvent calls f with the value of every event of a marshalled WatchResponse.
func eachEvent(b []byte, f func(value []byte)) {
	eachField(b, responseEvents, func(event []byte) {
		eachField(event, eventKV, func(kv []byte) { eachField(kv, kvValue, f) })
	})
}

func eachField(b []byte, field protowire.Number, f func([]byte)) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return
		}
		b = b[n:]
		if num == field && typ == protowire.BytesType {
			v, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return
			}
			f(v)
			b = b[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return
		}
		b = b[n:]
	}
}

// watch lets n workers put under the watched prefixes and counts what arrives.
func (b *bench) watch(ctx context.Context, t *target, sets []keyset, n int) (result, error) {
	w, err := openWatches(ctx, t.name, sets)
	if err != nil {
		return result{}, err
	}
	defer w.close()
	start := time.Now()
	usage, stop := b.usage(t, start)
	defer stop()
	end := start.Add(b.duration)
	perSet := make([]atomic.Int64, len(sets))
	var errs atomic.Int64
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			set := i % len(sets)
			k := sets[set]
			value := append([]byte(nil), b.value...)
			for j := 0; time.Now().Before(end) && ctx.Err() == nil; j++ {
				rctx, cancel := context.WithTimeout(ctx, requestTimeout)
				binary.BigEndian.PutUint64(value, uint64(time.Now().UnixNano()))
				_, err := pb.NewKVClient(k.conn(i/len(sets)+j)).Put(rctx, &pb.PutRequest{Key: fmt.Appendf(nil, "%swatch/%d/%d", k.prefix, i, j%100), Value: value})
				cancel()
				if err != nil {
					errs.Add(1)
				} else {
					perSet[set].Add(1)
				}
			}
		})
	}
	wg.Wait()
	var expected int64
	for i := range perSet {
		ours := int64(watches / len(sets))
		if i < watches%len(sets) {
			ours++
		}
		expected += perSet[i].Load() * ours
	}
	for last := time.Now().Add(drain); w.events.Load() < expected && time.Now().Before(last); time.Sleep(time.Millisecond) {
	}
	took := time.Since(start)
	got := w.events.Load()
	w.mu.Lock()
	r := summarise(w.lat, took)
	w.mu.Unlock()
	r.ops, r.errs = float64(got)/took.Seconds(), errs.Load()+w.gone.Load()
	if err := usage(&r, int(got)); err != nil {
		return r, err
	}
	if got < expected {
		return r, fmt.Errorf("watches of %s got %d events of %d", t.name, got, expected)
	}
	return r, nil
}
