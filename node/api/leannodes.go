package api

import (
	"errors"
	"strings"
	"sync"
	"time"
	"weak"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	informerscore "k8s.io/client-go/informers/core"
	informerscorev1 "k8s.io/client-go/informers/core/v1"
	listersv1 "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// encodedNodes is an informer factory that holds Nodes encoded: 0.4 KB each instead of 1.5 . Admission reads one at a time, by its
// name. Nobody is told of their changes, so a handler is refused.
type encodedNodes struct {
	informers.SharedInformerFactory
}

type encodedNodesCore struct{ informerscore.Interface }

type encodedNodesV1 struct{ informerscorev1.Interface }

func (f encodedNodes) Core() informerscore.Interface {
	return encodedNodesCore{f.SharedInformerFactory.Core()}
}

func (c encodedNodesCore) V1() informerscorev1.Interface { return encodedNodesV1{c.Interface.V1()} }

func (c encodedNodesV1) Nodes() informerscorev1.NodeInformer {
	return nodeLookup{c.Interface.Nodes().Informer()}
}

// nodeLookup is a NodeInformer for those who look Nodes up.
type nodeLookup struct{ cache.SharedIndexInformer }

func (n nodeLookup) Informer() cache.SharedIndexInformer { return n }
func (n nodeLookup) Lister() listersv1.NodeLister        { return nodeLister{n.SharedIndexInformer} }

var errNodesUnwatched = errors.New("api: Nodes are held to be looked up, nobody is told of their changes")

func (n nodeLookup) AddEventHandler(cache.ResourceEventHandler) (cache.ResourceEventHandlerRegistration, error) {
	return nil, errNodesUnwatched
}

func (n nodeLookup) AddEventHandlerWithResyncPeriod(cache.ResourceEventHandler, time.Duration) (cache.ResourceEventHandlerRegistration, error) {
	return nil, errNodesUnwatched
}

func (n nodeLookup) AddEventHandlerWithOptions(cache.ResourceEventHandler, cache.HandlerOptions) (cache.ResourceEventHandlerRegistration, error) {
	return nil, errNodesUnwatched
}

type nodeLister struct{ held cache.SharedIndexInformer }

func (l nodeLister) Get(name string) (*corev1.Node, error) {
	obj, _, err := l.held.GetIndexer().GetByKey(name)
	if err != nil {
		return nil, err
	}
	n, ok := obj.(*encodedNode)
	if !ok {
		return nil, apierrors.NewNotFound(corev1.Resource("nodes"), name)
	}
	return n.decode(), nil
}

func (l nodeLister) List(selector labels.Selector) (out []*corev1.Node, err error) {
	for _, obj := range l.held.GetIndexer().List() {
		if n, ok := obj.(*encodedNode); ok {
			if node := n.decode(); selector.Matches(labels.Set(node.Labels)) {
				out = append(out, node)
			}
		}
	}
	return out, nil
}

// encodedNode is a Node.
type encodedNode struct {
	raw           string              // without its room
	name, version string              // parts of raw
	room          corev1.ResourceList // allocatable, shared with others
	decoded       weak.Pointer[corev1.Node]
}

// decoding guards encodedNode.decoded of all.
var decoding sync.Mutex

func encodeNode(n *corev1.Node) (*encodedNode, error) {
	room := n.Status.Allocatable
	n.Status.Allocatable = nil
	b, err := n.Marshal()
	if err != nil {
		return nil, err
	}
	e := &encodedNode{raw: string(b), room: room}
	e.name, e.version = partOf(e.raw, n.Name), partOf(e.raw, n.ResourceVersion)
	return e, nil
}

// partOf returns the part of s that equals part, which is there.
func partOf(s, part string) string {
	i := strings.Index(s, part)
	return s[i : i+len(part)]
}

// decode returns the Node, the same one as long as somebody has it and the collector has not come by.
func (e *encodedNode) decode() *corev1.Node {
	decoding.Lock()
	defer decoding.Unlock()
	if n := e.decoded.Value(); n != nil {
		return n
	}
	n := &corev1.Node{}
	if err := n.Unmarshal([]byte(e.raw)); err != nil {
		panic("api: a Node that was encoded here does not decode: " + err.Error())
	}
	n.Status.Allocatable = e.room
	e.decoded = weak.Make(n)
	return n
}

// GetObjectMeta implements metav1.ObjectMetaAccessor, with what an informer reads.
func (e *encodedNode) GetObjectMeta() metav1.Object {
	return &metav1.ObjectMeta{Name: e.name, ResourceVersion: e.version}
}
