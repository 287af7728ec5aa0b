package etcdapi

import (
	"context"
	"io"
	"log/slog"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/server/v3/proxy/grpcproxy/adapter"

	"skein.io/skein/consensus/internal/logbridge"
)

// keepAliveTimeout is how long clientv3 waits for the first answer of a lease's
// keep-alive; the value of etcd's own in-process client.
const keepAliveTimeout = time.Second

// NewClient returns a client of the replica in this process: no socket, no
// marshalling, requests and responses are passed by pointer. The values of a
// request's context reach the server. It does not retry, and needs to be closed.
// progress is NewWatch's.
func NewClient(r Replica, progress time.Duration, log *slog.Logger) *kubernetes.Client {
	c := clientv3.NewCtxClient(context.Background(), clientv3.WithZapLogger(logbridge.Zap(log)))
	c.KV = clientv3.NewKVFromKVClient(adapter.KvServerToKvClient(NewKV(r)), c)
	c.Lease = clientv3.NewLeaseFromLeaseClient(adapter.LeaseServerToLeaseClient(NewLease(r)), c, keepAliveTimeout)
	c.Watcher = quietWatcher{clientv3.NewWatchFromWatchClient(adapter.WatchServerToWatchClient(NewWatch(r, progress)), c)}
	c.Maintenance = clientv3.NewMaintenanceFromMaintenanceClient(adapter.MaintenanceServerToMaintenanceClient(endedByEOF{NewMaintenance(r)}), c)
	c.Cluster = clientv3.NewClusterFromClusterClient(adapter.ClusterServerToClusterClient(NewCluster(r)), c)
	k := &kubernetes.Client{Client: c}
	k.Kubernetes = k
	return k
}

// endedByEOF ends a snapshot in process as gRPC would: the adapter ends streams
// with a cancelled context, which the client takes for a failure.
type endedByEOF struct{ pb.MaintenanceServer }

func (s endedByEOF) Snapshot(q *pb.SnapshotRequest, stream pb.Maintenance_SnapshotServer) error {
	if err := s.MaintenanceServer.Snapshot(q, stream); err != nil {
		return err
	}
	return io.EOF
}

// quietContext hides a context's values from formatting: clientv3 keys its
// streams by the printed metadata, and printing values of others is a data race.
type quietContext struct{ context.Context }

func (quietContext) String() string { return "skein" }

type quietWatcher struct{ clientv3.Watcher }

func (w quietWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	return w.Watcher.Watch(quietContext{ctx}, key, opts...)
}

func (w quietWatcher) RequestProgress(ctx context.Context) error {
	return w.Watcher.RequestProgress(quietContext{ctx})
}
