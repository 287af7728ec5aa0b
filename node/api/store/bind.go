package store

import (
	"context"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	etcdclient "go.etcd.io/etcd/client/v3/kubernetes"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/etcd3/metrics"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/features"

	"skein.io/skein/node/api/store/rawlist"
)

type bindingKey struct{}

// WithBinding says that the update of a pod under the context is upstream's for this binding, as admission has left it: nothing else. It may then be done to what is stored,
// without decoding it.
func WithBinding(ctx context.Context, b *core.Binding) context.Context {
	return context.WithValue(ctx, bindingKey{}, b)
}

// binds is the storage of pods, which binds those that are stored as today's upstream stores them without decoding them. What is read for that may be old, as the local
// copy is: the write compares. All else, and every refusal, is upstream's.
type binds struct {
	storage.Interface
	client *etcdclient.Client
	config *storagebackend.ConfigForResource
	// prefix begins all keys, resource those of the resource behind it.
	prefix, resource string
}

// GuaranteedUpdate implements storage.Interface.
func (s binds) GuaranteedUpdate(ctx context.Context, key string, out runtime.Object, ignoreNotFound bool,
	p *storage.Preconditions, update storage.UpdateFunc, cached runtime.Object,
) error {
	if b, ok := ctx.Value(bindingKey{}).(*core.Binding); ok && p != nil && p.ResourceVersion != nil && len(b.Annotations) == 0 {
		if done, err := s.bind(ctx, key, b, *p.ResourceVersion); done {
			return err
		}
	}
	return s.Interface.GuaranteedUpdate(ctx, key, out, ignoreNotFound, p, update, cached)
}

// keyContext authenticates a value by its key, as etcd3 does when it writes.
type keyContext string

// AuthenticatedData implements value.Context.
func (k keyContext) AuthenticatedData() []byte { return []byte(k) }

// bind binds the pod if it is of a version. Not done leaves it to upstream, which finds out why: nothing has been written.
func (s binds) bind(ctx context.Context, key string, b *core.Binding, version string) (done bool, err error) {
	rev, err := strconv.ParseInt(version, 10, 64)
	if err != nil {
		return false, nil
	}
	if key, err = storage.PrepareKey(s.resource, key, false); err != nil {
		return false, nil
	}
	at := strings.TrimSuffix(s.prefix, "/") + "/" + strings.TrimPrefix(key, "/")
	began := time.Now()
	r, err := s.client.KV.Get(ctx, at, clientv3.WithSerializable())
	metrics.RecordEtcdRequest("get", s.config.GroupResource, err, began)
	if err != nil || len(r.Kvs) != 1 || r.Kvs[0].ModRevision != rev {
		return false, nil
	}
	data, stale, err := s.config.Transformer.TransformFromStorage(ctx, r.Kvs[0].Value, keyContext(at))
	if err != nil || stale {
		return false, nil
	}
	gates := utilfeature.DefaultFeatureGate
	change := rawlist.Binding{UID: string(b.UID), Node: b.Target.Name, At: metav1.Now(), KeepNominated: !gates.Enabled(features.ClearingNominatedNodeNameAfterBinding)}
	if gates.Enabled(features.PodTopologyLabelsAdmission) {
		change.Labels = b.Labels
	}
	data, ok := rawlist.Bind(data, change)
	if !ok {
		return false, nil
	}
	if data, err = s.config.Transformer.TransformToStorage(ctx, data, keyContext(at)); err != nil {
		return true, storage.NewInternalError(err)
	}
	began = time.Now()
	put, err := s.client.Kubernetes.OptimisticPut(ctx, at, data, rev, etcdclient.PutOptions{})
	metrics.RecordEtcdRequest("update", s.config.GroupResource, err, began)
	return err != nil || put.Succeeded, err
}
