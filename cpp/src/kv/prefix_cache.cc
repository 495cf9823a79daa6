#include "kv/prefix_cache.h"

#include <algorithm>
#include <new>

#include "core/token_hash.h"

namespace tidal {

size_t PrefixCache::TokensHash::operator()(std::span<const int32_t> tokens) const {
  return HashOf(tokens, tokens.size());
}

bool PrefixCache::TokensEqual::operator()(std::span<const int32_t> one,
                                          std::span<const int32_t> other) const {
  return std::equal(one.begin(), one.end(), other.begin(), other.end());
}

PrefixCache::PrefixCache(PagePool& pool) : pool_(pool) {
  pool.SetHolder(this);
}

PrefixCache::~PrefixCache() {
  Clear();
  pool_.SetHolder(nullptr);
}

std::span<const int32_t> PrefixCache::PageOf(std::span<const int32_t> tokens, size_t index) const {
  auto page_size = static_cast<size_t>(pool_.page_size());
  return tokens.subspan(index * page_size, page_size);
}

std::vector<PrefixCache::NodeIterator> PrefixCache::Walk(std::span<const int32_t> tokens,
                                                         std::string_view salt,
                                                         int64_t max_pages) const {
  std::vector<NodeIterator> path;
  auto root = roots_.find(salt);
  if (root == roots_.end()) return path;
  const Children* children = &root->second;
  for (size_t i = 0; i < static_cast<size_t>(max_pages); ++i) {
    auto child = children->find(PageOf(tokens, i));
    if (child == children->end()) break;
    path.push_back(child->second);
    children = &child->second->children;
  }
  return path;
}

void PrefixCache::Touch(const std::vector<NodeIterator>& path) {
  for (auto node = path.rbegin(); node != path.rend(); ++node) {
    nodes_.splice(nodes_.end(), nodes_, *node);
  }
}

std::vector<int32_t> PrefixCache::Find(std::span<const int32_t> tokens, std::string_view salt) {
  std::vector<int32_t> pages;
  if (tokens.empty()) return pages;
  auto num_tokens = static_cast<int64_t>(tokens.size());
  std::vector<NodeIterator> path = Walk(tokens, salt, (num_tokens - 1) / pool_.page_size());
  pages.reserve(path.size());
  for (NodeIterator node : path) pages.push_back(node->page);
  Touch(path);
  ++stats_.lookups;
  if (!path.empty()) ++stats_.hits;
  stats_.lookup_tokens += num_tokens;
  stats_.hit_tokens += static_cast<int64_t>(path.size()) * pool_.page_size();
  return pages;
}

PrefixMatch PrefixCache::Peek(std::span<const int32_t> tokens, std::string_view salt) const {
  PrefixMatch match;
  if (tokens.empty()) return match;
  int64_t max_pages = (static_cast<int64_t>(tokens.size()) - 1) / pool_.page_size();
  for (NodeIterator node : Walk(tokens, salt, max_pages)) {
    ++match.num_pages;
    if (!pool_.IsOwned(node->page)) ++match.num_idle;
  }
  return match;
}

void PrefixCache::Publish(std::span<const int32_t> tokens, std::span<const int32_t> pages,
                          std::string_view salt) noexcept {
  auto num_tokens = static_cast<size_t>(std::min(
      static_cast<int64_t>(tokens.size()), static_cast<int64_t>(pages.size()) * pool_.page_size()));
  num_tokens -= num_tokens % static_cast<size_t>(pool_.page_size());
  if (num_tokens == 0) return;
  try {
    Insert(tokens.first(num_tokens), pages, salt);
  } catch (const std::bad_alloc&) {
    // What was kept so far is whole.
  }
  auto root = roots_.find(salt);
  if (root != roots_.end() && root->second.empty()) roots_.erase(root);
}

void PrefixCache::Insert(std::span<const int32_t> tokens, std::span<const int32_t> pages,
                         std::string_view salt) {
  auto num_pages = static_cast<int64_t>(tokens.size()) / pool_.page_size();
  std::vector<NodeIterator> path = Walk(tokens, salt, num_pages);
  Touch(path);
  auto root = roots_.find(salt);
  if (root == roots_.end()) root = roots_.emplace(salt, Children{}).first;
  // A page is older in the list than the one before it.
  auto place = path.empty() ? nodes_.end() : path.back();
  for (auto i = path.size(); i < static_cast<size_t>(num_pages); ++i) {
    if (pool_.IsHeld(pages[i])) return;  // known by another salt
    bool has_parent = i > 0;
    Children& siblings = has_parent ? place->children : root->second;
    place = nodes_.insert(place, Node{.page = pages[i],
                                      .has_parent = has_parent,
                                      .parent = place,
                                      .root = root,
                                      .tokens = nullptr});
    std::span<const int32_t> ids = PageOf(tokens, i);
    try {
      place->tokens = &siblings.emplace(Tokens(ids.begin(), ids.end()), place).first->first;
    } catch (...) {
      nodes_.erase(place);
      throw;
    }
    pool_.Hold(pages[i]);
  }
}

void PrefixCache::Forget(std::span<const int32_t> tokens, std::string_view salt) noexcept {
  auto root = roots_.find(salt);
  if (root == roots_.end() || static_cast<int64_t>(tokens.size()) < pool_.page_size()) return;
  auto first = root->second.find(PageOf(tokens, 0));
  if (first != root->second.end()) Remove(first->second);
}

void PrefixCache::Clear() noexcept {
  while (!nodes_.empty()) Remove(nodes_.begin());
}

void PrefixCache::Evict(int64_t count) noexcept {
  int64_t goal = pool_.num_idle() - count;
  // Once around: what is in use, or before a page in use, is as good as used just now.
  for (auto unseen = nodes_.size(); unseen > 0 && pool_.num_idle() > goal; --unseen) {
    auto oldest = nodes_.begin();
    if (oldest->children.empty() && !pool_.IsOwned(oldest->page)) {
      RemoveLeaf(oldest);
      ++stats_.evictions;
    } else {
      nodes_.splice(nodes_.end(), nodes_, oldest);
    }
  }
  // Pages of an ended sequence may lie before those of one that still runs: both read the same
  // tokens at the same time, and the first to publish won. What lies behind is forgotten with them.
  while (pool_.num_idle() > goal) {
    auto idle = std::find_if(nodes_.begin(), nodes_.end(),
                             [&](const Node& node) { return !pool_.IsOwned(node.page); });
    auto before = nodes_.size();
    Remove(idle);
    stats_.evictions += static_cast<int64_t>(before - nodes_.size());
  }
}

void PrefixCache::Remove(NodeIterator node) noexcept {
  auto leaf = node;
  while (true) {
    while (!leaf->children.empty()) leaf = leaf->children.begin()->second;
    bool is_last = leaf == node;
    auto parent = leaf->parent;
    RemoveLeaf(leaf);
    if (is_last) return;
    leaf = parent;
  }
}

void PrefixCache::RemoveLeaf(NodeIterator leaf) noexcept {
  Children& siblings = leaf->has_parent ? leaf->parent->children : leaf->root->second;
  siblings.erase(siblings.find(*leaf->tokens));
  if (leaf->root->second.empty()) roots_.erase(leaf->root);
  pool_.Drop(leaf->page);
  nodes_.erase(leaf);
}

PrefixStats PrefixCache::stats() const {
  PrefixStats stats = stats_;
  stats.pages = static_cast<int64_t>(nodes_.size());
  return stats;
}

}  // namespace tidal
